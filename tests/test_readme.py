"""The README's section on an architecture of one's own is code that runs as it stands."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from flax import nnx

import gemma_jax as gj

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
