"""`gemma-jax plan`."""

import importlib.util
import json

import pytest


def test_gpus(cli):
    ran = cli("plan", "gemma3-27b-it", "--topology", "gpu:h200x4", "--context", "131072", "--json")
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)
    assert told["devices"] == 4 and told["mesh"] == {"tensor": 4} and told["fits"] is True
    assert told["compiled"] is None and told["memory_bytes"] == 141 * 10**9
    assert told["work"]["mode"] == "decode" and told["work"]["batch"] == 1
    assert told["peak_bytes"] == told["weights_bytes"] + told["cache_bytes"]
    roofline = told["read_bytes"] / 4.8e12
    assert told["roofline_seconds"] == pytest.approx(roofline)
    assert told["tokens_per_second"] == pytest.approx(1 / roofline)


def test_for_people(cli):
    ran = cli("plan", "gemma3-1b", "--topology", "gpu:t4", "--context", "8192", "--quant", "int8")
    assert ran.code == 0
    assert "gemma3-1b on gpu:t4: decode, 1 x 8,192 tokens" in ran.out
    assert "fits" in ran.out and "tokens/s" in ran.out


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
    where = ("--topology", "gpu:t4", "--context", "1024", "--json")
    told = json.loads(cli("plan", "gemma3-12b", *where, "--quant", "int8", "--fit", "context").out)
    assert told["fits"] and told["work"]["context"] % 1024 == 0
    assert told["memory_bytes"] - told["peak_bytes"] < 1024 * 8 * 2 * 8 * 256 * 2 + 1


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
        (["--topology", "gpu:h100", "--mesh", "tensor=2"], "does not make use of exactly 1"),
        (["--topology", "gpu:h100x3"], "3 devices cannot share the model's heads"),
        (["--topology", "gpu:h100x8", "--mesh", "data=8"], "B=1 cannot be split over mesh axis"),
        (["--topology", "gpu:t4", "--search", "--mesh", "tensor=1"], "give no --mesh or --fit"),
        (["--topology", "gpu:h100", "--batch", "0"], "batch=0 and context=1024 must be at least 1"),
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
