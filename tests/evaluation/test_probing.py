"""Models asked about long texts."""

import math
from dataclasses import replace

import numpy as np
import pytest

import gemma_jax as gj
from gemma_jax.evaluation import probing
from gemma_jax.evaluation.long_context import long_question
from gemma_jax.evaluation.probing import Found, probe, ring_error

MODEL = "checkpoints/elastic"


@pytest.fixture(scope="module")
def loaded():
    return gj.load(MODEL, layout="scan", config=lambda cfg: replace(cfg, max_positions=1024))


@pytest.mark.nightly
def test_every_task_has_its_figures(loaded):
    found = probe(*loaded, tasks=["needle", "variables"], lengths=[300], depths=[1.0])
    assert [(one.task, one.depth) for one in found] == [("needle", 1.0), ("variables", None)]
    for one in found:
        assert one.tokens < 300 and 0 <= one.accuracy <= 1
        assert math.isfinite(one.log_prob) and math.isfinite(one.log_prob_without)


def test_log_probabilities_are_those_of_one_pass(loaded):
    model, tok = loaded
    (one,) = probe(model, tok, tasks=["needle"], lengths=[300], depths=[0.5], seed=7)

    def encode(text):
        return tok.encode(text, bos=True, parse_special=False)

    question = long_question("needle", encode, 300, depth=0.5, seed=7)
    answer = tok.encode(question.answer, parse_special=False)
    whole = gj.score(model, encode(question.prompt) + answer)[-len(answer) :]
    assert one.log_prob == pytest.approx(float(whole.mean()), abs=1e-4)
    assert one.answers == question.answers


def test_rings_are_one_pass_over_the_same_windows(loaded, monkeypatch):
    model = loaded[0]
    ids = np.random.default_rng(0).integers(10, model.cfg.vocab_size, 700).tolist()
    assert ring_error(model, ids) < 2e-4
    wider = [one if one.window is None else replace(one, window=600) for one in model.cfg.layers]
    other, _ = gj.load(MODEL, layout="scan", config=lambda cfg: replace(
        cfg, max_positions=1024, layers=tuple(wider)
    ))  # fmt: skip
    whole = probing._whole
    monkeypatch.setattr(probing, "_whole", lambda model, *row: whole(other, *row))
    assert ring_error(model, ids) > 0.01


def test_the_map_of_depths():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: gemma-jax[notebook]")
    rest = dict(task="needle", seed=0, tokens=1, answers=("1",), said="", log_prob=0.0)
    found = [
        Found(length=n, depth=d, accuracy=d, log_prob_without=0.0, **rest)
        for n in (10, 20) for d in (0.0, 1.0)
    ]  # fmt: skip
    ax = gj.viz.plot_depths(found)
    np.testing.assert_array_equal(ax.images[0].get_array(), [[0, 0], [100, 100]])
    with pytest.raises(ValueError, match="has a depth"):
        gj.viz.plot_depths([])


@pytest.mark.nightly
def test_the_real_270m_finds_needles(real_gguf):
    found = probe(
        *gj.load(real_gguf, weights="auto"), tasks=["needle", "many-keys"], lengths=[256, 1024],
        depths=[0.0, 0.5],
    )  # fmt: skip
    assert [one.accuracy for one in found] == [1.0] * 8
    assert all(one.log_prob - one.log_prob_without > 2 for one in found)
