"""An engine that serves many: each text is what it is alone, whatever happens beside it."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from marks import nightly
from training.test_lora import filled

import gemma_jax as gj
from gemma_jax.inference.engine import Engine
from gemma_jax.inference.requests import Full, Request

CFG = tiny.gemma3(2, every=2)  # windows of 8: texts below outgrow their rings


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


def drawn(n, random, rules=RULES[2:3]):
    return request(
        int(random.integers(1, 45)), int(random.integers(1, 18)), seed=n,
        sampling=rules[random.integers(len(rules))], owner=str(n % 3), stop_ids=(5, 9),
    )  # fmt: skip


def assert_as_offline(model, asked, cancelled=()):
    """Requests and answers against one offline batch of them all, each up to its own limit."""
    together = gj.generate(
        model, None, [one.prompt.token_ids for one, _ in asked],
        sampling=[one.sampling for one, _ in asked], seed=[one.seed for one, _ in asked],
        max_new_tokens=max(one.max_new_tokens for one, _ in asked), stop_ids=asked[0][0].stop_ids,
    )  # fmt: skip
    for n, ((one, answer), done) in enumerate(zip(asked, together)):
        ids = done.token_ids[: one.max_new_tokens]
        if n in cancelled and answer.reason == "cancelled":
            ids = ids[: len(answer.ids)]
        else:
            assert answer.reason == ("stop" if ids[-1] in one.stop_ids else "length")
        assert answer.ids == ids
        np.testing.assert_allclose(answer.log_probs, done.log_probs[: len(ids)], atol=2e-5)


@pytest.mark.parametrize(
    "seed, rules", [(7, RULES[1::2]), *nightly(*((seed, RULES) for seed in range(20)))]
)
def test_texts_are_what_they_are_alone(model, seed, rules):
    """Drawn arrivals, lengths, rules and cancellations; more requests than slots."""
    engine = Engine(model, slots=3, context=64, chunk=16, burst=4)
    random, asked, tickets = np.random.default_rng(seed), [], []
    for n in range(14):
        one = drawn(n, random, rules)
        ticket, answer = submitted(engine, one)
        asked.append((one, answer))
        tickets.append(ticket)
        for _ in range(random.integers(3)):
            engine.step()
    gone = {3, 8, 13}
    for n in gone:
        tickets[n].cancel()
    run(engine)
    assert_as_offline(model, asked, gone)
    assert engine.stats()["running"] == engine.stats()["waiting"] == 0


KINDS = [  # family, layout, options of the runtime
    ("gemma2", "scan", dict(attention_impl="reference")),
    *nightly(
        ("gemma3", "scan", dict(attention_impl="reference")),
        ("gemma3n", "unrolled", {}),
        ("gemma2", "scan", {}),
        ("gemma4", "scan", {}),
        ("gemma", "unrolled", {}),
        ("gemma3", "scan", dict(cache_dtype="int8")),
        *(("gemma3", "unrolled", dict(attention_impl=name)) for name in ("reference", "xla")),
    ),
]


@pytest.mark.parametrize("family, layout, runtime", KINDS)
def test_every_family_and_attention(family, layout, runtime):
    model = tiny.model(tiny.FAMILIES[family](), layout, **runtime)
    engine, random, asked = (
        Engine(model, slots=2, context=64, chunk=16),
        np.random.default_rng(3),
        [],
    )
    for n in range(4):
        one = drawn(n, random)
        asked.append((one, submitted(engine, one)[1]))
        engine.step()
    run(engine)
    if "cache_dtype" not in runtime:
        assert_as_offline(model, asked)
        return
    # A sum in another order may round to another whole number, in an offline batch of them all as
    # well: against each alone, in the same passes.
    for one, answer in asked:
        assert_alone(model, one, answer)


def test_each_request_has_its_own_adapter():
    base = tiny.model(CFG)
    lora = {n: filled(base, gj.Lora(rank=2, targets=("blocks.*.attn.*",)), i) for i, n in
            enumerate(("one", "two"))}  # fmt: skip
    model = gj.with_adapters(base, lora)
    engine, asked = Engine(model, slots=2, context=64, chunk=16), []
    for name in ("one", "two", None, "one"):
        one = request(11, 6, adapter=name)
        asked.append((name, submitted(engine, one)[1]))
    run(engine)
    texts = set()
    for name, answer in asked:
        wanted = gj.generate(gj.choose_adapters(model, name), None, one.prompt, max_new_tokens=6)
        assert answer.ids == wanted.token_ids
        texts.add(tuple(answer.ids))
    assert len(texts) == 3


def test_pictures_are_read_whole():
    cfg = tiny.gemma3(2, every=2, vision=tiny.vision())
    model = tiny.model(cfg, "unrolled")
    ids = tiny.tokens(replace(cfg, vocab_size=90), 1, 18)[0].tolist()
    ids = [*ids[:14], 91, 90, 90, 90, 90, 92, *ids[14:]]  # a cut at 16 would go through it
    pixels = np.random.default_rng(0).standard_normal((2, 3, 56, 56)).astype(np.float32)
    engine = Engine(model, slots=2, context=64, chunk=16, prefix_bytes=10**6)
    asked = []
    for one in (0, 1, 0):
        prompt = gj.Prompt(ids, pixels[one : one + 1])
        ticket, answer = submitted(engine, Request(prompt=prompt, max_new_tokens=6))
        run(engine)
        assert answer[-1].error == ""
        asked.append((ticket.cached_tokens, answer.ids))
        wanted = gj.generate(model, None, prompt, max_new_tokens=6, chunk=16)
        assert answer.ids == wanted.token_ids
    assert [cached for cached, _ in asked] == [0, 15, 15]  # the same text before another picture


def test_nothing_compiles_after_warming_up(model, engine, compilations):
    engine.warm_up(prompt_log_probs=True)
    assert (
        len(engine.programs()) == len(set(engine.programs())) == 22
    )  # one row has programs of its own
    assert len(engine.programs(prompt_log_probs=True)) == 23
    compilations.clear()
    for n, rules in enumerate(RULES):
        submitted(engine, request(30 - 9 * n, 6, sampling=rules, top_log_probs=n, seed=n))
        engine.step()
    run(engine)
    for n in range(4):
        submitted(engine, request(3 + n, 6, sampling=RULES[n % 3], seed=n))
    run(engine)
    for n in range(2):
        submitted(engine, request(30 - n, n, top_log_probs=n, prompt_log_probs=True))
    run(engine)
    assert not compilations


def test_rows_that_are_left_move_to_the_first_slots(model, monkeypatch):
    """Where six of seven requests have ended, a step for the first slot alone goes on."""
    engine, widths = Engine(model, slots=7, context=64, chunk=16, burst=2), []
    monkeypatch.setattr(engine._slots, "write", spied(engine._slots.write, widths))
    asked = [request(9 + n, 24 if n >= 5 else 4, seed=n, sampling=RULES[n % 2]) for n in range(7)]
    answers = [submitted(engine, one)[1] for one in asked]
    run(engine)
    for one, answer in zip(asked, answers):
        assert_alone(model, one, answer)
    assert max(widths) == 7 and widths[-1] == 2


def spied(write, widths):
    def noted(requests, *rest):
        widths.append(1 + max(requests))
        return write(requests, *rest)

    return noted


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
