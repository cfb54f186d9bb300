"""Log-probabilities of prompts, as an engine reads them: those that `score` and `forward` give."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from inference.test_engine import CFG, alone, request, run, submitted
from marks import nightly
from training.test_lora import filled

import gemma_jax as gj
from gemma_jax.inference.engine import Engine
from gemma_jax.placement import shard
from gemma_jax.sharding import INFERENCE, make_mesh

ATOL = 2e-5  # ten times the rounding of float32 sums in another order; mistakes show at 0.1


@pytest.fixture(scope="module")
def model():
    return tiny.model(CFG, "unrolled")


def told(answer):
    """Log-probabilities of a prompt, and the most probable tokens at each place."""
    values = [p for piece in answer for p in piece.prompt_log_probs]
    return values, [best for piece in answer for best in piece.prompt_top_log_probs]


@pytest.mark.parametrize(
    "family, layout",
    [("gemma3", "unrolled"), *nightly(("gemma3n", "unrolled"), ("gemma2", "scan"))],
)
def test_they_are_those_of_score_beside_other_rows(family, layout):
    """Prompts of several chunks, of two and of one token; the last layers are not left out."""
    model = tiny.model(tiny.FAMILIES[family](), layout)
    engine = Engine(model, slots=3, context=64, chunk=16)
    others = [submitted(engine, request(9, 40 + n, top_log_probs=1))[1] for n in range(2)]
    engine.step()
    whole = request(41, 5, prompt_log_probs=True, top_log_probs=3)
    ids = whole.prompt.token_ids
    scores = gj.score(model, ids)
    logits_TV = gj.forward(model, np.array([ids])).logits[0]
    wanted_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    for length, new in ((41, 5), (17, 0), (1, 0)):
        one = replace(whole, prompt=gj.Prompt(ids[:length]), max_new_tokens=new)
        _, answer = submitted(engine, one)
        run(engine)
        values, best = told(answer)
        np.testing.assert_allclose(values, scores[: length - 1], atol=ATOL)
        for wanted_V, pairs in zip(wanted_TV[: length - 1], best, strict=True):
            told_ids, told_values = zip(*pairs)
            np.testing.assert_allclose(told_values, np.sort(wanted_V)[:-4:-1], atol=ATOL)
            np.testing.assert_allclose(told_values, wanted_V[list(told_ids)], atol=ATOL)
        assert answer.reason == "length" and len(answer.ids) == new
        if new:
            _, plain = submitted(engine, replace(one, prompt_log_probs=False))
            run(engine)
            assert answer.ids == plain.ids and told(plain) == ([], [])
    assert all(answer.reason == "length" for answer in others)
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0


def test_a_token_and_its_place_among_the_best_have_the_very_same_number(model):
    """By which clients see whether a token was the most probable one."""
    ids = request(30, 1).prompt.token_ids
    logits_TV = np.asarray(gj.forward(model, np.array([ids[:-1]])).logits[0])
    greedy = [*ids[:-1], int(logits_TV[-1].argmax())]
    engine = Engine(model, slots=1, context=64, chunk=16)
    one = gj.Request(
        prompt=gj.Prompt(greedy), max_new_tokens=0, prompt_log_probs=True, top_log_probs=1
    )
    _, answer = submitted(engine, one)
    run(engine)
    values, best = told(answer)
    assert best[-1] == [(greedy[-1], values[-1])]
    assert all(value <= top[0][1] for value, top in zip(values, best))


def test_what_is_kept_of_earlier_prompts_changes_nothing(model):
    """The whole prompt is read again, and what is kept stays what others are to find."""
    kept = Engine(model, slots=2, context=64, chunk=16, prefix_bytes=10**7)
    none = Engine(model, slots=2, context=64, chunk=16)
    plain, scored = request(41, 6), request(41, 6, prompt_log_probs=True, top_log_probs=2)
    answers, cached = [], []
    for engine, one in (
        (kept, plain),
        (kept, scored),
        (kept, plain),
        (none, plain),
        (none, scored),
    ):
        ticket, answer = submitted(engine, one)
        run(engine)
        answers.append((answer.ids, answer.log_probs, *told(answer)))
        cached.append(ticket.cached_tokens)
    assert cached == [0, 0, 32, 0, 0]
    assert answers[1] == answers[4] and len(answers[1][2]) == 40
    assert answers[0] == answers[2] == answers[3]
    fresh = Engine(model, slots=2, context=64, chunk=16, prefix_bytes=10**7)
    counts = []
    for one in (scored, plain):
        counts.append(submitted(fresh, one)[0])
        run(fresh)
    assert [ticket.cached_tokens for ticket in counts] == [0, 0]  # nor is anything kept of it


def test_programs_for_them_are_made_when_asked_for(model):
    """One more for each width of a chunk; that no others are needed, `test_engine.py` hears."""
    engine = Engine(model, slots=3, context=64, chunk=32)
    plain, with_them = engine.programs(), engine.programs(prompt_log_probs=True)
    assert len(with_them) == len(plain) + 2
    assert set(with_them) - set(plain) == {f"read {n}, log-probabilities" for n in (16, 32)}


def test_who_has_gone_is_not_read_to_the_end(model):
    engine = Engine(model, slots=1, context=64, chunk=16)
    ticket = engine.submit(request(60, 0, prompt_log_probs=True), lambda piece: 1 / 0)
    other = submitted(engine, request(5, 3))[1]
    run(engine)
    assert ticket.cancelled and ticket.ended and other.reason == "length"


def test_what_cannot_be_told_is_refused(model):
    engine = Engine(model, slots=1, context=64, chunk=16)
    with pytest.raises(ValueError, match="max_new_tokens=0 must be at least 1"):
        engine.submit(request(5, 0), print)
    with pytest.raises(ValueError, match="65 tokens needed"):
        engine.submit(request(65, 0, prompt_log_probs=True), print)


def test_each_prompt_has_its_own_adapter(model):
    loras = {n: filled(model, gj.Lora(rank=2, targets=("blocks.*.attn.*",)), i)
             for i, n in enumerate(("one", "two"))}  # fmt: skip
    held = gj.with_adapters(model, loras)
    engine, found = Engine(held, slots=2, context=64, chunk=16), []
    for name in (*loras, None):
        one = request(20, 0, adapter=name, prompt_log_probs=True)
        _, answer = submitted(engine, one)
        run(engine)
        found.append(told(answer)[0])
        wanted = gj.score(gj.choose_adapters(held, name), one.prompt.token_ids)
        np.testing.assert_allclose(found[-1], wanted, atol=ATOL)
    assert not np.allclose(found[0], found[1], atol=1e-3)


def test_on_a_mesh(model):
    """Where rows are divided, the row that reads has empty ones beside it."""
    split = shard(model, make_mesh(CFG, jax.devices()[:4], data=2, tensor=2), INFERENCE)
    engine = Engine(split, slots=2, context=64, chunk=16)
    one = request(41, 3, prompt_log_probs=True, top_log_probs=2)
    _, answer = submitted(engine, one)
    run(engine)
    values, best = told(answer)
    np.testing.assert_allclose(values, gj.score(model, one.prompt.token_ids), atol=ATOL)
    assert len(best) == 40 and answer.ids == alone(model, one).token_ids
