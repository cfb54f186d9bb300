"""What the README says to run runs as it stands: an architecture of one's own, a fine-tune."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax import nnx

import gemma_jax as gj
from gemma_jax.cli.app import run
from gemma_jax.runs.config import read_config

ROOT = Path(__file__).parent.parent
RUN_LONG = True  # hundred steps of training


def section() -> str:
    """The code of the section "Your own architecture"."""
    text = (ROOT / "README.md").read_text("utf-8").partition("\n## Your own architecture\n")[2]
    (code,) = re.findall(r"^```python\n(.*?)^```", text.partition("\n## ")[0], re.M | re.S)
    return code


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that has the checkpoints of the repository, and may be written to."""
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_config_of_the_readme_is_what_it_is_said_to_be(place):
    """By day; at night all of it runs."""
    definitions, rest, _ = section().partition("\nmodel, baseline = train(")
    assert rest
    exec(definitions, names := {})
    cfg = names["cfg"]
    assert [spec.window for spec in cfg.layers] == [256, 256, 256, None] and not cfg.qk_norm
    lines = section()[section().index("near =") : section().index("text =")].split("\n")
    assert len([line for line in lines if line]) <= 20
    for variant in (cfg, replace(cfg, qk_norm=True)):
        model = jax.eval_shape(lambda cfg=variant: gj.Gemma(cfg, rngs=nnx.Rngs(0)))
        assert jax.eval_shape(gj.loss, model, names["held_out"]).shape == ()


@pytest.mark.nightly
def test_the_architecture_of_the_readme_learns_and_comes_back(place, capsys):
    exec(section(), {})
    printed = capsys.readouterr().out.splitlines()
    counts, baseline, model = (float(re.search(r"\d\.\d\d", line)[0]) for line in printed[:3])
    assert baseline < counts - 1 and model < counts - 1
    assert printed[3] == "True"
    assert (place / "my-gemma").is_dir()


def finetune_commands() -> list[list[str]]:
    """Words behind `gemma-jax` of each line of the section "Fine-tune"."""
    text = (ROOT / "README.md").read_text("utf-8").partition("\n## Fine-tune\n")[2]
    (code,) = re.findall(r"^```bash\n(.*?)^```", text.partition("\n## ")[0], re.M | re.S)
    return [shlex.split(line.partition("bin/gemma-jax ")[2]) for line in code.splitlines()]


def test_the_fine_tune_of_the_readme_is_a_run():
    (train, file), (generate, prompt, *options) = finetune_commands()
    assert (train, generate) == ("train", "generate")
    config, _ = read_config(ROOT / file)
    assert options[options.index("--adapter") + 1] == f"{config.out}/adapter"
    assert options[options.index("--model") + 1] == config.model
    files = (*config.data.files, *config.held_out.files)
    trained, held_out = ((ROOT / name).read_text("utf-8") for name in files)
    assert prompt in held_out and prompt not in trained


@pytest.mark.nightly
def test_the_fine_tune_of_the_readme_learns_to_count(place, capsys):
    pytest.importorskip("grain", reason="pip install 'gemma-jax[train]'")
    (place / "gemma_jax").symlink_to(ROOT / "gemma_jax")
    train, generate = finetune_commands()
    assert run(train) == 0
    lines = (place / "runs/counting/metrics.jsonl").read_text("utf-8").splitlines()
    losses = [json.loads(line).get("held_out_loss") for line in lines]
    first, *_, last = [loss for loss in losses if loss is not None]
    assert last < first / 2
    capsys.readouterr()
    assert run(generate) == 0
    numbers = [int(n) for n in re.findall(r"\d+", generate[1])]
    assert ", ".join(str(numbers[-1] + i) for i in (1, 2, 3)) in capsys.readouterr().out
