"""`gemma-jax train`: runs from a config, and steps on stored inputs of another library."""

import json
from pathlib import Path

import numpy as np
import pytest
from marks import nightly
from parity.goldens import DATA
from safetensors.numpy import load_file, save_file

FOLDER = DATA / "training"
CASES = json.loads((FOLDER / "cases.json").read_text())

CONFIG = """
model = "{model}"
out = "{out}"
steps = 4
[data]
files = "{data}"
tokens_per_row = 32
rows = 2
[adapter]
rank = 2
targets = ["blocks.*.attn.q.w"]
[optimizer]
rate = 1e-2
[every]
save = 2
evaluate = 2
"""


@pytest.fixture
def config(talker, tmp_path):
    """A config whose run takes seconds."""
    rows = [{"prompt": f"{i} {i + 1}", "completion": f" {i + 2}"} for i in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "run.toml"
    path.write_text(CONFIG.format(model=talker, out=tmp_path / "run", data=data))
    return path


def assert_within(actual, expected, tolerance, name):
    most, rms = tolerance
    error = np.asarray(actual, np.float64).reshape(expected.shape) - expected
    assert np.abs(error).max() <= (most or 0), name
    assert np.sqrt(np.mean(np.square(error))) <= (rms or 0), name


def stored_settings(name: str, folder: Path) -> Path:
    """The settings of a case, in a file, and the names of what is stored of it."""
    stored = load_file(FOLDER / f"{name}.safetensors")
    outputs = {key.removeprefix("out."): {} for key in stored if key.startswith("out.")}
    said = {k: v for k, v in CASES[name].items() if k in ("optimiser", "micro_rows")}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(said | {"outputs": outputs}))
    return path


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("g3_text_accumulate", 1),
        *nightly(
            ("g3_text_steps", 3),
            ("g3_mm_steps", 3),
            ("g3_mm_steps_frozen_vision", 3),
            ("g3_mm_accumulate", 1),
            ("g3n_text_steps", 3),
            ("g3n_text_accumulate", 1),
        ),
    ],
)
def test_stored_steps(cli, tmp_path, name, steps):
    model = DATA / "_".join(name.split("_")[:2])
    inputs, out = FOLDER / f"{name}.safetensors", tmp_path / "out.safetensors"
    words = ("--model", model, "--inputs", inputs, "--output", out)
    settings = stored_settings(name, tmp_path)
    ran = cli("train", "--dry-run-steps", str(steps), *words, "--settings", settings)
    assert ran.code == 0, ran.err
    expected, ours = load_file(inputs), load_file(out)
    tolerances = CASES[name]["tolerances"]
    assert len(tolerances) >= 8
    for output, tolerance in tolerances.items():
        assert_within(ours[output], expected[f"out.{output}"], tolerance, output)


def test_a_run_from_its_config(cli, config, tmp_path):
    ran = cli("train", config)
    assert ran.code == 0, ran.err
    run = tmp_path / "run"
    assert ran.out == f"{run / 'adapter'}\n"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert all(line["tokens_per_second"] > 0 for line in lines if "loss" in line)
    assert (run / "loss.png").stat().st_size > 5000
    said = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"]) == ("LORA", 2)


@pytest.mark.nightly
def test_what_happens_beside(cli, config, tmp_path):
    words = ("--set", 'samples.prompts=["1 2"]', "--set", "samples.tokens=4")
    words += ("--set", f'held_out.files="{tmp_path / "rows.jsonl"}"')
    assert cli("train", config, *words).code == 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert len(held_out) == 3 and held_out[2] < held_out[0]
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [(one["step"], one["prompt"]) for one in samples] == [(0, "1 2"), (4, "1 2")]


def test_a_run_goes_on(cli, refused, config, tmp_path):
    assert cli("train", config, "--set", "steps=2").code == 0
    assert "holds a run; go on with it by --resume" in refused("train", config)
    text = refused("train", config, "--resume", "--set", "optimizer.rate=2e-2")
    assert "optimizer.rate was 0.01, now 0.02" in text
    (tmp_path / "run" / "adapter").rename(tmp_path / "first")
    assert cli("train", config, "--resume").code == 0
    arrays = [load_file(f / "adapter_model.safetensors") for f in (tmp_path / "first",
              tmp_path / "run" / "adapter")]  # fmt: skip
    assert any((arrays[0][name] != arrays[1][name]).any() for name in arrays[0])


def test_what_is_in_the_data(cli, config):
    ran = cli("train", config, "--check")
    assert ran.code == 0, ran.err
    assert "data: " in ran.out and "6 " in ran.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("steps=0", "steps=0 must be positive"),
        ("data.rosw=2", "[data] has no 'rosw'; did you mean rows?"),
        ("optimizer.name=adam", "optimizer"),
        ("objective.name=sft", "there is no objective 'sft'"),
        ("objective.name=dpo", "preferences are read as pairs: data.pairs = true"),
        ("objective.name=distill", "distillation needs a teacher: reference = SRC"),
        ("reference=checkpoints/digits", "'next_token' reads no reference"),
        ("adapter.rank=0", "rank=0 must be positive"),
        ("stesp=3", "has no 'stesp'; did you mean steps?"),
        ("data.epochs=1", "end after 1"),
        ("remat=fully", "remat='fully' must be"),
        ("nothing", "expected table.key=VALUE"),
    ],
)
def test_wrong_configs(refused, config, change, said):
    assert said in refused("train", config, "--set", change)


def test_wrong_files(refused, tmp_path, config):
    assert "No such file" in refused("train", tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("model = ")
    assert "is no TOML" in refused("train", broken)
    assert "name a config" in refused("train")
    assert "--output is for --dry-run-steps" in refused("train", config, "--output", "x")
    assert "--dry-run-steps needs --inputs" in refused("train", "--dry-run-steps", "1", "-m", "x")


def test_places_without_images_are_refused(refused, tmp_path):
    given = load_file(FOLDER / "g3_mm_steps.safetensors")
    given = {k: v for k, v in given.items() if k.startswith("in.") and "pixel" not in k}
    save_file(given, tmp_path / "in.safetensors")
    words = ("--model", DATA / "g3_mm", "--inputs", tmp_path / "in.safetensors")
    words += ("--output", tmp_path / "out", "--dry-run-steps", "1")
    text = refused("train", *words, "--settings", stored_settings("g3_mm_steps", tmp_path))
    assert "places for soft tokens in input_ids, but no pixel_values" in text
