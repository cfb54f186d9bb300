"""Training in two processes, each with its own devices and its own part of the data."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from cli.test_multihost import finish, free_port, start
from safetensors.numpy import load_file

import gemma_jax as gj

CONFIG = """
model = "{model}"
out = "{out}"
steps = {steps}
[data]
files = "{data}"
tokens_per_row = 32
rows = 4
[adapter]
rank = 2
targets = ["blocks.*.attn.*.w"]
[optimizer]
rate = 1e-2
[every]
save = 2
"""
BY_ROWS = "data=2,fsdp=2"


@pytest.fixture
def config(talker, tmp_path):
    """`config(name, steps)` writes that of a run in the folder of this name."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} {i + 1}", "completion": f" {i + 2}"} for i in range(16)]
    data.write_text("\n".join(map(json.dumps, rows)))

    def write(name: str, steps: int) -> Path:
        path = tmp_path / f"{name}.toml"
        said = CONFIG.format(model=talker, out=tmp_path / name, data=data, steps=steps)
        path.write_text(said)
        return path

    return write


def begin(config: Path, *words: str, mesh: str = BY_ROWS):
    common = ["-m", "gemma_jax.cli", "train", str(config), *words]
    common += ["--set", f"load.mesh={{{mesh}}}", "--coordinator", f"127.0.0.1:{free_port()}"]
    common += ["--num-processes", "2", "--process-id"]
    return start([[*common, str(i)] for i in range(2)], 2)


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def adapter(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


@pytest.mark.nightly
@pytest.mark.parametrize("mesh", [BY_ROWS, "fsdp=4", "tensor=4"])
def test_two_processes_train_what_one_does(cli, config, tmp_path, mesh):
    """With meshes that split rows by process, and with one whose devices all see all rows."""
    alone = cli("train", config("alone", 3))
    assert alone.code == 0, alone.err
    ran = finish(begin(config("both", 3), mesh=mesh), 200)
    assert [code for code, _, _ in ran] == [0, 0], ran[-1][2][-2000:]
    assert [out for _, out, _ in ran] == [f"{tmp_path / 'both' / 'adapter'}\n", ""]
    assert "step 3 of 3" in ran[0][2] and "step 3 of 3" not in ran[1][2]
    np.testing.assert_allclose(losses(tmp_path / "both"), losses(tmp_path / "alone"), rtol=1e-5)
    one, both = adapter(tmp_path / "alone"), adapter(tmp_path / "both")
    assert one.keys() == both.keys()
    for name, array in one.items():
        np.testing.assert_allclose(both[name], array, atol=1e-4, err_msg=name)


@pytest.mark.nightly
def test_a_process_that_is_killed(config, tmp_path):
    """The other one ends; both go on from what they saved together, as if nothing had been."""
    ran = finish(begin(config("whole", 40)), 300)
    assert [code for code, _, _ in ran] == [0, 0], ran[-1][2][-2000:]
    running = begin(config("cut", 40))
    while (
        not (lines := tmp_path / "cut" / "metrics.jsonl").is_file() or len(losses(lines.parent)) < 5
    ):
        assert all(process.poll() is None for process in running)
        time.sleep(0.02)
    running[1].kill()
    assert all(code for code, _, _ in finish(running, 120))
    before = losses(tmp_path / "cut")
    assert 5 <= len(before) < 40
    ran = finish(begin(tmp_path / "cut.toml", "--resume"), 300)
    assert [code for code, _, _ in ran] == [0, 0], ran[-1][2][-2000:]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    whole, cut = adapter(tmp_path / "whole"), adapter(tmp_path / "cut")
    for name, array in whole.items():
        np.testing.assert_array_equal(cut[name], array, err_msg=name)


@pytest.mark.nightly
def test_a_whole_model_is_saved_by_all_processes(config, tmp_path):
    path = config("model", 2)
    text = path.read_text()
    path.write_text(text[: text.index("[adapter]")] + text[text.index("[optimizer]") :])
    ran = finish(begin(path, mesh="fsdp=4"), 200)
    assert [code for code, _, _ in ran] == [2, 2]
    assert all('save_as = "orbax"' in err for _, _, err in ran)
    assert not (tmp_path / "model").exists()
    ran = finish(begin(path, "--set", "save_as=orbax", mesh="fsdp=4"), 200)
    assert [code for code, _, _ in ran] == [0, 0], ran[-1][2][-2000:]
    found = losses(tmp_path / "model")
    assert len(found) == 2 and found[1] < found[0]
    model, tokenizer = gj.load(str(tmp_path / "model" / "model"))
    ids = tokenizer.encode("1 2 3", bos=True)
    assert np.isfinite(gj.loss(model, np.array([ids])))
