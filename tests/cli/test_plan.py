"""`gemma-jax plan`."""

import importlib.util
import json

import pytest
from test_imports import ROOT


def test_gpus(cli):
    ran = cli("plan", "gemma3-27b-it", "--topology", "gpu:h200x4", "--context", "131072", "--json")
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)
    assert told["devices"] == 4 and told["mesh"] == {"tensor": 4} and told["fits"] is True
    assert told["compiled"] is None and told["memory_bytes"] == int(139.72 * 2**30)
    assert told["usable_bytes"] == int(0.75 * told["memory_bytes"])  # JAX's default
    assert told["work"]["mode"] == "decode" and told["work"]["batch"] == 1
    assert told["peak_bytes"] == told["weights_bytes"] + told["cache_bytes"]
    roofline = told["read_bytes"] / 4.8e12
    assert told["roofline_seconds"] == pytest.approx(roofline)
    assert told["tokens_per_second"] == pytest.approx(1 / roofline)


def test_for_people(cli):
    ran = cli("plan", "gemma3-1b", "--topology", "gpu:t4", "--context", "8192", "--quant", "int8")
    assert ran.code == 0
    assert "gemma3-1b on gpu:t4: decode, 1 x 8,192 tokens" in ran.out
    lines = {words[0]: " ".join(words[1:]) for words in _rows(ran.out)}
    assert lines["verdict"].startswith("fits, ") and "of 11.73 GB usable" in lines["verdict"]
    assert lines["memory per device"].startswith("15.63 GB by CUDA; JAX takes 75%")
    assert lines["at most"].endswith("tokens/s by the roofline; real programs are slower")


def _rows(table: str) -> list[list[str]]:
    """Cells of a table, each line; what is wrapped is joined to its row."""
    rows: list[list[str]] = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        if cells and cells[0]:
            rows.append(cells)
        elif cells:
            rows[-1] += cells[1:]
    return rows


@pytest.mark.parametrize("how", [["--json"], ["--search"], ["--fit", "batch"]])
def test_no_room_is_an_answer_with_a_code_of_its_own(cli, how):
    where = ("gemma3-27b", "--topology", "gpu:t4", "--context", "1024")
    ran = cli("plan", *where, *how)
    assert ran.code == 3
    if how == ["--json"]:
        assert json.loads(ran.out)["fits"] is False and ran.err == ""
    else:
        assert ran.out == "" and ran.err.count("\n") == 1 and "--weights int8" in ran.err


def test_a_share_of_the_memory(cli):
    where = ("plan", "gemma3-12b", "--topology", "gpu:l4", "--context", "1024", "--json")
    small, large = cli(*where), cli(*where, "--memory-fraction", "0.92", "--weights", "int8")
    assert (small.code, large.code) == (3, 0)
    told = json.loads(large.out)
    assert told["usable_bytes"] == int(0.92 * told["memory_bytes"])


def test_both_spellings_of_narrow_weights(cli):
    where = ("plan", "gemma3-1b", "--topology", "gpu:l4", "--context", "1024", "--json")
    told = [json.loads(cli(*where, name, "int8").out) for name in ("--weights", "--quant")]
    assert told[0] == told[1] and told[0]["work"]["weights"] == "int8"
    wide, plain = cli(*where, "--weights", "float32"), cli(*where)
    assert json.loads(wide.out)["weights_bytes"] == 2 * json.loads(plain.out)["weights_bytes"]


def test_what_fits_in_so_many_bytes(cli):
    from gemma_jax.decoder.cache import cache_bytes
    from gemma_jax.presets import preset

    told = json.loads(cli("plan", "gemma3-1b", "--memory", "640MB", "--json").out)
    rows = {row["weights"]: row for row in told["storages"]}
    assert told["memory_bytes"] == 640_000_000
    assert rows["int8"]["contexts"] == {"float32": 0, "bfloat16": 0, "int8": 0}
    contexts = rows["int4"]["contexts"]
    assert 0 < contexts["float32"] < contexts["bfloat16"] < contexts["int8"] < 32_768
    longest = [cache_bytes(preset("gemma3-1b"), 1, contexts["int8"] + n, "int8") for n in (0, 1)]
    assert longest[0] <= 640_000_000 - rows["int4"]["bytes"] < longest[1]


def test_a_table_on_disk_makes_room(cli):
    shown = cli("plan", ROOT / "checkpoints" / "elastic", "--memory", "3MB").out
    assert "int8, table on disk" in shown and "in 0.00 GB" in shown


def test_bytes_that_hold_nothing_or_are_none(cli, refused):
    assert cli("plan", "gemma3-27b", "--memory", "500 MB").code == 3
    assert "as in 8GB" in refused("plan", "gemma3-1b", "--memory", "much")
    both = ("plan", "gemma3-1b", "--memory", "8GB", "--topology", "gpu:t4")
    assert "any machine" in refused(*both)
    assert "or --memory" in refused("plan", "gemma3-1b", "--context", "1024")


def test_a_mesh(cli):
    where = ("--topology", "gpu:h100x8", "--context", "8192", "--batch", "4", "--json")
    told = json.loads(cli("plan", "gemma3-4b", *where, "--mesh", "data=2,tensor=4").out)
    assert told["mesh"] == {"data": 2, "tensor": 4}
    # More devices than key heads: the caches are split as far as they can be.
    told = json.loads(cli("plan", "gemma3-4b", *where, "--mesh", "tensor=8").out)
    assert told["mesh"] == {"tensor": 4, "group": 2}


def test_ranking(cli):
    where = ("--topology", "gpu:h100x4", "--context", "8192", "--batch", "4")
    ran = cli("plan", "gemma3-4b", *where, "--search", "--json")
    plans = json.loads(ran.out)["plans"]
    speeds = [plan["tokens_per_second"] for plan in plans]
    assert len(plans) > 3 and speeds == sorted(speeds, reverse=True)
    assert ran.err.count("fits") == len(plans)


def test_longest(cli):
    where = ("--topology", "gpu:l4", "--context", "1024", "--json", "--fit", "context")
    told = json.loads(cli("plan", "gemma3-12b", *where, "--weights", "int8").out)
    assert told["fits"] and told["work"]["context"] % 1024 == 0
    assert told["usable_bytes"] - told["peak_bytes"] < 1024 * 8 * 2 * 8 * 256 * 2 + 1


def test_a_slice(cli):
    where = ("--topology", "gpu:l4", "--context", "4096", "--json")
    whole = json.loads(cli("plan", "gemma3n-e4b", *where).out)
    sliced = json.loads(cli("plan", "gemma3n-e4b", *where, "--slice", "e2b").out)
    assert sliced["weights_bytes"] < whole["weights_bytes"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--topology", "v9:4x4"], "unknown topology 'v9:4x4'; give a TPU slice (v5e, "),
        (["--topology", "gpu:h100", "--mesh", "tensor"], "--mesh 'tensor': expected AXIS=N,..."),
        (["--topology", "gpu:h100", "--mesh", "model=1"], "unknown mesh axes ['model']"),
        (
            ["--topology", "gpu:h100", "--mesh", "tensor=2"],
            "is for 2 devices, but there is 1",
        ),
        (["--topology", "gpu:h100x3"], "3 devices cannot share the model's heads"),
        (["--topology", "gpu:h100x8", "--mesh", "data=8"], "B=1 cannot be split over mesh axis"),
        (["--topology", "gpu:t4", "--search", "--mesh", "tensor=1"], "give no --mesh or --fit"),
        (["--topology", "gpu:h100", "--memory-fraction", "1.5"], "--memory-fraction 1.5 must be"),
        (
            ["--topology", "v5e:4x4", "--memory-fraction", "0.9"],
            "is about GPUs; TPUs have",
        ),
        (["--topology", "gpu:h100", "--weights", "int2"], "--weights / --quant: 'int2' is not one"),
        (["--topology", "gpu:h100", "--batch", "0"], "--batch 0 and --context 1024 must"),
    ],
)
def test_what_cannot_be_planned(cli, arguments, said):
    ran = cli("plan", "gemma3-27b", "--context", "1024", *arguments)
    assert ran.code == 2 and said in ran.err and len(ran.err.splitlines()) == 1


def test_without_a_compiler(cli, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    ran = cli("plan", "gemma3-1b", "--topology", "v5p:4x4x4", "--context", "1024")
    assert ran.code == 2 and "pip install 'gemma-jax[plan]'" in ran.err


CONFIG = """
model = "gemma3-1b"
out = "nowhere"
micro_batches = 4
[data]
files = "no such file.jsonl"
tokens_per_row = 2048
rows = 2
[adapter]
rank = 8
[optimizer]
name = "adafactor"
"""


def test_the_step_of_a_run(cli, tmp_path):
    """Neither the data nor the weights that the config names are there."""
    (tmp_path / "run.toml").write_text(CONFIG, "utf-8")
    run = ("plan", "gemma3-1b", "--mode", "train", "--config", str(tmp_path / "run.toml"))
    run = (*run, "--topology", "gpu:a100x2", "--json")
    plain, narrow = cli(*run), cli(*run, "--set", "load.weights=int8")
    told, stored = json.loads(plain.out), json.loads(narrow.out)
    assert (plain.code, plain.err, told["fits"]) == (0, "", True)
    assert told["mesh"] == {"fsdp": 2} and told["work"]["context"] == 2048
    assert told["training"]["optimizer"] == {"name": "adafactor"}
    assert 0 < told["trained_bytes"] < told["weights_bytes"] / 20
    assert stored["trained_bytes"] == told["trained_bytes"]  # factors are float32 beside whatever
    assert stored["weights_bytes"] < 0.7 * told["weights_bytes"]
    tokens = 2 * 4 * 2048
    assert told["tokens_per_second"] == pytest.approx(tokens / told["roofline_seconds"])
    for more, said in {
        ("--batch", "4"): "--batch would; change it by --set",
        ("--mode", "decode"): "add --mode train",
        ("--set", "model=gemma3-4b"): "trains gemma3-4b, not gemma3-1b",
        ("--set", "load.weights=stored"): "name a storage",
    }.items():
        ran = cli(*run, *more)
        assert ran.code == 2 and said in ran.err and ran.err.count("\n") == 1
