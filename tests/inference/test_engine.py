"""An engine that serves many: each text is what it is alone, whatever happens beside it."""

import numpy as np
import pytest
import tiny

import gemma_jax as gj
from gemma_jax.inference.decode import advance, inserted
from gemma_jax.inference.engine import Engine
from gemma_jax.inference.requests import Full, Request

CFG = tiny.gemma3(3)  # windows of 8: texts below outgrow their rings


@pytest.fixture(scope="module")
def model():
    return tiny.model(CFG, "unrolled")


@pytest.fixture
def engine(model):
    engine = Engine(model, slots=3, context=64, chunk=16, burst=4)
    yield engine
    engine.close()


def request(length, new_tokens, *, seed=0, **options):
    ids = tiny.tokens(CFG, 1, length, seed=length)[0].tolist()
    return Request(prompt=gj.Prompt(ids), max_new_tokens=new_tokens, seed=seed, **options)


def alone(model, one):
    return gj.generate(
        model, None, one.prompt, max_new_tokens=one.max_new_tokens, sampling=one.sampling,
        seed=one.seed, stop_ids=one.stop_ids,
    )  # fmt: skip


class Answer(list):
    """Pieces of one request."""

    ids = property(lambda self: [i for piece in self for i in piece.token_ids])
    log_probs = property(lambda self: [p for piece in self for p in piece.log_probs])
    top = property(lambda self: [t for piece in self for t in piece.top_log_probs])
    reason = property(lambda self: self[-1].finish_reason if self else None)


def submitted(engine, one):
    answer = Answer()
    return engine.submit(one, answer.append), answer


def run(engine):
    while engine.step():
        pass


def assert_alone(model, one, answer):
    done = alone(model, one)
    assert answer.ids == done.token_ids and answer.reason == done.finish_reason
    np.testing.assert_allclose(answer.log_probs, done.log_probs, atol=2e-5)
    assert [piece.finish_reason for piece in answer[:-1]] == [None] * (len(answer) - 1)


RULES = (
    gj.Sampling(),
    gj.Sampling(temperature=1.0),
    gj.Sampling(temperature=0.9, top_k=5, top_p=0.9),
    gj.Sampling(temperature=1.2, min_p=0.02, repetition_penalty=1.4, frequency_penalty=0.5),
)


def test_texts_are_what_they_are_alone(model, engine):
    """Drawn arrivals, lengths, rules and cancellations; more requests than slots."""
    random = np.random.default_rng(7)
    asked = []
    for n in range(14):
        one = request(
            int(random.integers(1, 45)), int(random.integers(1, 18)), seed=n,
            sampling=RULES[random.integers(len(RULES))], owner=str(n % 3), stop_ids=(5, 9),
        )  # fmt: skip
        asked.append((one, *submitted(engine, one)))
        for _ in range(random.integers(3)):
            engine.step()
    gone = {3, 8, 13}
    for n in gone:
        asked[n][1].cancel()
    run(engine)
    for n, (one, _, answer) in enumerate(asked):
        if n in gone and answer.reason == "cancelled":
            assert answer.ids == alone(model, one).token_ids[: len(answer.ids)]
        else:
            assert_alone(model, one, answer)
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0


def test_nothing_compiles_after_warming_up(model, engine):
    engine.warm_up()
    before = advance._cache_size(), inserted._cache_size()
    assert len(engine.programs()) == len(set(engine.programs())) == 9
    for n, rules in enumerate(RULES):
        submitted(engine, request(30 - 9 * n, 6, sampling=rules, top_log_probs=n, seed=n))
        engine.step()
    run(engine)
    assert (advance._cache_size(), inserted._cache_size()) == before


def test_a_cancelled_request_frees_its_slot(model):
    engine = Engine(model, slots=1, context=64, chunk=16, burst=2)
    first, second = request(5, 40), request(6, 4)
    ticket, heard = submitted(engine, first)
    _, other = submitted(engine, second)
    engine.step()
    assert len(heard.ids) == 2 and not other
    ticket.cancel()
    engine.step()
    assert heard.reason == "cancelled" and len(other.ids) == 2
    run(engine)
    assert_alone(model, second, other)


def test_listeners_and_deadlines_end_their_own_request_alone(model, engine):
    def gone(piece):
        raise OSError("nobody listens")

    engine.submit(request(5, 30), gone)
    _, late = submitted(engine, request(6, 30, deadline=0.0))
    one = request(7, 12)
    _, answer = submitted(engine, one)
    run(engine)
    assert late.reason == "deadline" and not late.ids
    assert_alone(model, one, answer)
    assert engine.stats()["finished"] == {"deadline": 1, "cancelled": 1, "length": 1}


def test_a_failure_of_the_device_ends_what_it_took_along(model, engine, monkeypatch):
    answers = [submitted(engine, request(n, 30))[1] for n in (4, 5)]
    for _ in range(3):
        engine.step()
    whole = engine._slots.write
    monkeypatch.setattr(engine._slots, "write", lambda *a: 1 / 0)
    engine.step()
    assert [answer.reason for answer in answers] == ["error"] * 2
    assert "ZeroDivisionError" in answers[0][-1].error
    monkeypatch.setattr(engine._slots, "write", whole)
    one = request(9, 8)
    _, answer = submitted(engine, one)
    run(engine)
    assert_alone(model, one, answer)


def test_bias_and_best_tokens(model, engine):
    plain = request(9, 6, top_log_probs=3)
    free = alone(model, plain).token_ids
    barred = request(9, 6, logit_bias={free[0]: -100.0})
    (_, answer), (_, other) = submitted(engine, plain), submitted(engine, barred)
    run(engine)
    assert_alone(model, plain, answer)
    assert [best[0][0] for best in answer.top] == answer.ids
    np.testing.assert_allclose([best[0][1] for best in answer.top], answer.log_probs, atol=1e-6)
    assert all(len(best) == 3 for best in answer.top)
    assert free[0] not in other.ids


class Listed:
    """Lets one of some texts be written, then a stop token."""

    def __init__(self, *texts, stop=1):
        self.texts, self.stop, self.at = texts, stop, []

    def mask(self):
        n = len(self.at)
        fit = [text for text in self.texts if list(text[:n]) == self.at]
        legal = [text[n] if n < len(text) else self.stop for text in fit]
        words = np.zeros(-(-CFG.vocab_size // 32), np.uint32)
        for i in legal:
            words[i // 32] |= np.uint32(1 << i % 32)
        return words

    def accept(self, token_ids):
        self.at += token_ids

    def forced(self):
        return []

    complete = property(lambda self: tuple(self.at) in self.texts)


def test_only_legal_tokens_beside_free_texts(model, engine):
    texts = (7, 40, 41, 80), (7, 60)
    free = request(12, 15)
    held = request(6, 12, constraint=Listed(*texts), stop_ids=(1,))
    (_, answer), (_, other) = submitted(engine, held), submitted(engine, free)
    run(engine)
    assert tuple(answer.ids[:-1]) in texts and answer.ids[-1] == 1 and answer.reason == "stop"
    assert_alone(model, free, other)

    class Broken(Listed):
        def mask(self):
            raise KeyError("lost")

    _, answer = submitted(engine, request(6, 12, constraint=Broken()))
    _, other = submitted(engine, free)
    run(engine)
    assert answer.reason == "error" and "lost" in answer[-1].error
    assert_alone(model, free, other)


def test_what_is_refused(model):
    engine = Engine(model, slots=1, context=64, chunk=16, queue=2, budget=100)
    for one, message in (
        (request(60, 10), r"70 tokens needed \(60 of prompt, 10 new\), but the context holds 64"),
        (request(5, 0), "max_new_tokens=0 must be at least 1"),
        (request(5, 2, top_log_probs=21), "top_log_probs=21 must be between 0 and 20"),
        (request(5, 2, adapter="x"), "no adapter 'x'; the model holds none"),
        (request(5, 2, logit_bias={96: 1.0}), "logit_bias has id 96 outside"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(one, print)
    engine.submit(request(40, 20), print)
    with pytest.raises(Full, match="41 tokens asked for, and 60 of a budget of 100") as full:
        engine.submit(request(40, 1), print)
    assert 1 <= full.value.retry_after <= 60
    engine.submit(request(5, 2), print)
    with pytest.raises(Full, match="2 requests wait already"):
        engine.submit(request(5, 2), print)


def test_a_thread_serves_until_it_is_closed(model):
    engine = Engine(model, slots=2, context=64, chunk=16)
    engine.start()
    asked = [request(5, 6), request(19, 8), request(3, 2)]
    answers = [submitted(engine, one)[1] for one in asked]
    assert engine.drain(60)
    with pytest.raises(Full, match="about to stop"):
        engine.submit(asked[0], print)
    engine.close()
    for one, answer in zip(asked, answers):
        assert_alone(model, one, answer)
