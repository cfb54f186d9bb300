"""Scores of texts that are longer than the context."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny

from gemma_jax import forward, score
from gemma_jax.evaluation.windows import rolling_windows

CONTEXT = 32
CFG = replace(tiny.gemma3(3), max_positions=CONTEXT)


@pytest.fixture(scope="module")
def model():
    return tiny.model(CFG, "unrolled")


def text(length):
    return tiny.tokens(CFG, 1, length, seed=length)[0].tolist()


def as_lm_eval(ids, context, stride):
    """The rule written down anew, as pairs of what is read and what is scored of it, both as lists.

    lm-eval 0.4.13 gives the same pairs with `context_len = context - stride + 1`.
    """
    pairs, scored = [], 1
    while scored < len(ids):
        count = min(len(ids) - scored, stride if pairs else context)
        end = scored + count
        pairs.append((ids[max(0, end - 1 - context) : end - 1], ids[scored:end]))
        scored = end
    return pairs


STRIDES = [(4, 1), (4, 2), (4, 3), (4, 4), (5, 2), (7, 7), (1, 1), (16, 5)]


@pytest.mark.parametrize("context, stride", STRIDES)
def test_windows_are_those_of_lm_eval(context, stride):
    for length in range(2, 40):
        ids = list(range(length))
        windows = rolling_windows(length, context, stride)
        pairs = [(ids[w.start : w.stop], ids[w.first : w.stop + 1]) for w in windows]
        assert pairs == as_lm_eval(ids, context, stride)


@pytest.mark.parametrize("context, stride", STRIDES)
def test_every_token_is_scored_once_with_as_much_of_a_past_as_fits(context, stride):
    for length in range(2, 40):
        windows = list(rolling_windows(length, context, stride))
        scored = [i for w in windows for i in range(w.first, w.stop + 1)]
        assert scored == list(range(1, length))
        for w in windows:
            assert 0 <= w.start < w.first <= w.stop and w.stop - w.start <= context
        for w in windows[1:]:
            assert w.stop - w.start == context and w.stop + 1 - w.first <= stride


@pytest.mark.parametrize("stride", [32, 12])
def test_scores_are_those_of_each_window_alone(model, stride):
    ids, expected = text(77), []
    for read, scored in as_lm_eval(ids, CONTEXT, stride):
        logits_TV = forward(model, np.array([read])).logits[0, -len(scored) :]
        expected.append(np.asarray(jax.nn.log_softmax(logits_TV))[range(len(scored)), scored])
    seen = []
    log_probs = score(model, ids, stride=stride, progress=lambda *amounts: seen.append(amounts))
    np.testing.assert_allclose(log_probs, np.concatenate(expected), atol=2e-5)
    assert log_probs.shape == (76,)
    assert seen[-1][0] == seen[-1][1] and sorted(seen) == seen


def test_a_text_that_fits_is_one_window(model):
    ids = text(CONTEXT)
    np.testing.assert_array_equal(score(model, ids, stride=5), score(model, ids))


def test_what_comes_before_the_tokens_of_a_window_is_read_and_not_scored(model, monkeypatch):
    """In chunks of 16, a stride of 12 leaves the first chunk of most windows without a target."""
    ids = text(77)
    whole = score(model, ids, stride=12)
    monkeypatch.setattr("gemma_jax.evaluation.scoring.CHUNK", 16)
    np.testing.assert_allclose(score(model, ids, stride=12), whole, atol=2e-5)


def test_longer_texts_need_a_stride_that_fits(model):
    with pytest.raises(ValueError, match=r"33 tokens do not fit the context of 32; stride=32 "):
        score(model, text(33))
    assert score(model, text(33), stride=32).shape == (32,)  # the last token is never read
    for stride in (0, -1, 33):
        with pytest.raises(ValueError, match=f"stride={stride} must lie between 1 and 32"):
            score(model, text(40), stride=stride)
