"""The stored fine-tune of the 270M: what its command makes, none of it held out."""

import json
from pathlib import Path

import pytest

from gemma_jax.experiments.finetune import corpus
from gemma_jax.runs.config import read_config

FOLDER = Path(corpus.__file__).parent
RUN_LONG = True  # programs of this module: see compile_effort


@pytest.fixture(scope="module")
def stored():
    return json.loads((FOLDER / "results.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def talks():
    for needed in ("yaml", "chatterbot_corpus"):
        pytest.importorskip(needed, reason="pip install 'gemma-jax[finetune]'")
    return corpus.conversations()


def shape_of(value):
    """Keys and types, however deep."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items() if key != "packages"}
    return type(value)


def test_it_has_learnt(stored):
    before, after = stored["before"], stored["after"]
    assert after["held_out"] < before["held_out"] - 1
    assert before["samples"].keys() == after["samples"].keys()
    assert all(before["samples"][prompt] != text for prompt, text in after["samples"].items())


def test_stored_results_are_of_this_config(stored):
    config, _ = read_config(FOLDER / "gemma3_270m.toml")
    assert stored["command"].endswith("experiments.finetune.train OUT")  # nothing changed by --set
    assert stored["steps"] == config.steps
    assert stored["tokens_per_step"] == config.data.rows * config.data.tokens_per_row
    assert tuple(stored["before"]["samples"]) == config.samples.prompts
    assert stored["data"]["licence"] == corpus.LICENCE


def test_stored_results_are_of_these_conversations(stored, talks):
    train, held_out = corpus.split(talks)
    assert stored["data"]["digest"] == corpus.digest(turn for talk in talks for turn in talk)
    assert (stored["data"]["train"], stored["data"]["held_out"]) == (len(train), len(held_out))


def test_nothing_that_is_held_out_is_trained_on(talks):
    train, held_out = corpus.split(talks)
    letters = [
        {"".join(c for c in turn.lower() if c.isalnum()) for talk in side for turn in talk}
        for side in (train, held_out)
    ]
    assert not letters[0] & letters[1]
    assert len(talks) / 20 < len(held_out) < len(talks) / 5
    assert len(train) + len(held_out) > 0.9 * len(talks)


def test_no_sequence_of_counting_is_on_both_sides():
    train, held_out = (
        {json.loads(line)["prompt"] for line in path.read_text("utf-8").splitlines()}
        for path in (FOLDER / "counting" / f"{name}.jsonl" for name in ("train", "held_out"))
    )
    assert train and held_out and not train & held_out


@pytest.mark.nightly
def test_the_command_makes_such_results(stored, talks, tmp_path):
    """In short, and on a model that is small."""
    pytest.importorskip("grain", reason="pip install 'gemma-jax[train]'")
    from gemma_jax.experiments.finetune.train import run

    small = Path(__file__).parents[2] / "checkpoints" / "elastic"
    changes = [f'model="{small}"', "steps=3", "data.tokens_per_row=512", "samples.tokens=4"]
    made = run(tmp_path, [*changes, 'held_out.too_long="drop"'])
    assert shape_of({"command": "", **made}) == shape_of(stored)
    assert made["data"] == stored["data"] and made["steps"] == 3
    assert made["after"]["held_out"] < made["before"]["held_out"]
