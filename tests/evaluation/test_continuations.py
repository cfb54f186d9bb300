"""Continuations of contexts: beginnings that are read once give what each pair gives by itself."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from marks import nightly

import gemma_jax as gj
from gemma_jax.evaluation import continuations

ATOL = 3e-5


def alone(model, context, continuation):
    """Log-probabilities and best choices of one pair, from all logits of one plain pass.

    What stands behind them is seen by no token, and makes one program serve all.
    """
    ids = [*context, *continuation]
    padded = np.pad(ids, (0, 128 - len(ids)))[None]
    logits_TV = np.asarray(gj.forward(model, padded).logits[0, len(context) - 1 : len(ids) - 1])
    places = np.arange(len(continuation)), list(continuation)
    return jax.nn.log_softmax(logits_TV)[places], logits_TV.argmax(-1) == continuation


def asked(cfg, *lengths, seed=0):
    """Three choices for contexts of these lengths, which begin alike as far as they go."""
    rng = np.random.default_rng(seed)

    def draw(count):
        return rng.integers(3, cfg.vocab_size, count).tolist()

    header, pairs = draw(40), []
    for length in lengths:
        context = (header + draw(max(0, length - 40)))[:length]
        first = draw(3)
        pairs += [(context, draw(4)), (context, draw(1)), (context, draw(1)), (context, first)]
        pairs += [(context, [*first[:2], first[2] - 1])]  # differs in its last token alone
    return pairs


def assert_as_alone(model, pairs, scores):
    for pair, score in zip(pairs, scores, strict=True):
        log_probs, greedy = alone(model, *pair)
        np.testing.assert_allclose(score.log_probs, log_probs, atol=ATOL)
        np.testing.assert_array_equal(score.greedy, greedy)


@pytest.mark.parametrize("family", ["gemma3n", "gemma2", *nightly("gemma", "gemma3")])
def test_shared_beginnings_change_nothing(family):
    model = tiny.model(tiny.FAMILIES[family]())
    pairs = asked(model.cfg, 1, 5, 43, 50, 50)
    assert_as_alone(model, pairs, gj.score_continuations(model, pairs))


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.gemma3(3), "unrolled")


def test_the_best_continuation_is_greedy(model):
    context = [2, 5, 7, 11]
    best = gj.generate(model, None, context, max_new_tokens=5).token_ids
    score, other = gj.score_continuations(model, [(context, best), (context, [best[0] - 1])])
    assert score.greedy.all() and not other.greedy.any()


def test_order_changes_not_a_bit(model):
    pairs = asked(model.cfg, 3, 45, 46)
    forwards = gj.score_continuations(model, pairs)
    backwards = gj.score_continuations(model, pairs[::-1] + pairs[:2])[: len(pairs)][::-1]
    for one, other in zip(forwards, backwards):
        np.testing.assert_array_equal(one.log_probs, other.log_probs)


def test_batches_change_nothing_but_roundings(model):
    pairs = asked(model.cfg, 3, 45, 46)
    whole = gj.score_continuations(model, pairs)
    for tokens in (1, 100):
        for one, other in zip(whole, gj.score_continuations(model, pairs, batch_tokens=tokens)):
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=ATOL)


def test_long_rows_are_read_in_chunks(model, monkeypatch):
    """What is read and what is scored cross the chunks' ends, and the windows of local layers."""
    rng, passes, judge = np.random.default_rng(1), [], continuations._judge
    context = rng.integers(3, 96, 70).tolist()
    pairs = [(context, rng.integers(3, 96, n).tolist()) for n in (33, 40, 2)]
    monkeypatch.setattr(continuations, "CHUNK", 16)
    monkeypatch.setattr(
        continuations,
        "_judge",
        lambda *args: passes.append(args[2].tokens_BT.shape) or judge(*args),
    )
    assert_as_alone(model, pairs, gj.score_continuations(model, pairs))
    assert {width for _, width in passes} == {16} and len(passes) == 3


def test_a_context_is_read_once_for_all_its_choices(model, monkeypatch):
    read, advance = [], continuations._advance

    def count(model, cache, batch):
        read.append(int((batch.positions_BT >= 0).sum()))
        return advance(model, cache, batch)

    monkeypatch.setattr(continuations, "_advance", count)
    context = tiny.tokens(model.cfg, 1, 50)[0].tolist()
    gj.score_continuations(model, [(context, [token]) for token in range(5, 9)])
    assert read == [49]
    read.clear()
    header, ends = context[:40], ([5, 6, 7], [8, 9, 10], [11])
    gj.score_continuations(model, [([*header, *end], [token]) for end in ends for token in (5, 6)])
    assert read == [40, 2 + 2]  # what the contexts share, then the rest of each but its last token


def test_an_empty_continuation_has_no_tokens(model):
    scores = gj.score_continuations(model, [([2, 5], []), ([2], [5])])
    assert [len(score.log_probs) for score in scores] == [0, 1]
    assert gj.score_continuations(model, []) == []


def test_what_fits_exactly(model):
    small = tiny.model(replace(model.cfg, max_positions=32), "unrolled")
    ids = tiny.tokens(small.cfg, 1, 33)[0].tolist()
    assert_as_alone(
        model, [(ids[:20], ids[20:])], gj.score_continuations(small, [(ids[:20], ids[20:])])
    )
    with pytest.raises(
        ValueError, match="context of 21 tokens and a continuation of 13 do not fit"
    ):
        gj.score_continuations(small, [([5, *ids[:20]], ids[20:])])


@pytest.mark.parametrize(
    "pair, message",
    [(([], [5]), "needs a token"), (([2], [96]), r"in \[0, 96\)"), (([-1], [5]), r"in \[0, 96\)")],
)
def test_wrong_pairs(model, pair, message):
    with pytest.raises(ValueError, match=message):
        gj.score_continuations(model, [pair])


def test_progress_ends_with_all(model):
    seen = []
    pairs = asked(model.cfg, 3, 45, 46)
    gj.score_continuations(model, pairs, progress=lambda *amounts: seen.append(amounts))
    assert seen[-1] == (3, 3) and sorted(seen) == seen


def test_windows_of_a_text_are_those_of_a_smaller_context(model):
    """`window=` is the context of another model that is otherwise the same."""
    ids = tiny.tokens(model.cfg, 1, 77)[0].tolist()
    small = tiny.model(replace(model.cfg, max_positions=32), "unrolled")
    for stride in (None, 12):
        expected = gj.score(small, ids, stride=stride or 32)
        np.testing.assert_allclose(
            gj.score(model, ids, window=32, stride=stride), expected, atol=ATOL
        )
    for window in (0, 513, 2.5):
        with pytest.raises(ValueError, match=f"window={window} must lie between 1 and 512"):
            gj.score(model, ids, window=window)
