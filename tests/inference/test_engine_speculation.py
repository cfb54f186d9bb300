"""Drafts in an engine's batch change how fast texts come, and nothing else, at any temperature."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from inference.test_engine import (
    CFG,
    RULES,
    Listed,
    alone,
    assert_alone,
    assert_as_offline,
    drawn,
    request,
    run,
    submitted,
)
from inference.test_speculation import p_value, pairs
from marks import nightly

import gemma_jax as gj
from gemma_jax.inference.decode import advance
from gemma_jax.inference.engine import Engine
from gemma_jax.inference.legal_tokens import LegalTokens
from gemma_jax.inference.lookup import GivenDrafts, Lookup, Patience, next_tokens

EAGER = Lookup(draft_tokens=3, lengths=(2, 1))  # drafts whenever it can, mostly wrongly


@pytest.fixture(scope="module")
def model():
    return tiny.model(CFG, "unrolled")


@pytest.fixture
def restless(monkeypatch):
    """Rows draft on, however often their drafts were wrong: so that random texts keep some."""
    monkeypatch.setattr("gemma_jax.inference.lookup.LONGEST_REST", 0)


def test_lookup_drafts_what_followed():
    lookup = Lookup(draft_tokens=3, lengths=(3, 2))
    for text, wanted in (
        ([1, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6]),
        ([9, 2, 3, 4, 5, 6, 1, 2, 3], [4, 5, 6]),  # two are enough
        ([1, 2, 7, 8, 9, 1, 2, 4, 5, 1, 2], [4, 5, 1]),  # where it stood last
        ([1, 2, 1, 2], [1, 2]),  # fewer, where there are no more
        ([7, 1, 2, -1, 5, 1, 2], []),  # no place of a picture
        ([5, -1, -1, 6, -1, -1], []),
        ([1, 2, 3], []),
        ([1], []),
    ):
        assert lookup.drafts(text) == wanted, text
    for options, message in ((dict(draft_tokens=0), "at least 1"), (dict(lengths=()), "lengths")):
        with pytest.raises(ValueError, match=message):
            Lookup(**options)


class Never(Lookup):
    """Drafts a token that the model does not say, and remembers behind how many."""

    def __init__(self, token: int):
        super().__init__(draft_tokens=2)
        object.__setattr__(self, "token", token)
        object.__setattr__(self, "asked", [])

    def drafts(self, text):
        self.asked.append(len(text))
        return [self.token] * self.draft_tokens


def test_a_row_rests_from_drafts_that_keep_missing(model):
    """The same text, with fewer and fewer passes that check them."""
    one = request(4, 40)
    wanted = alone(model, one).token_ids
    never = Never(next(i for i in range(CFG.vocab_size) if i not in wanted))
    engine = Engine(model, slots=1, context=64, chunk=16, burst=1, speculation=never)
    _, answer = submitted(engine, one)
    run(engine)
    assert answer.ids == wanted
    assert [length - 4 for length in never.asked] == [0, 1, 6, 15, 32]
    stats = engine.stats()
    assert (stats["drafted_tokens"], stats["kept_tokens"]) == (10, 0)


def test_what_is_kept_ends_the_rest():
    patience = Patience()
    for n in range(8):
        assert patience.drafts_at(100 * n)
        patience.saw(drafted=2, kept=0, count=100 * n)
    assert patience.until == 700 + 64  # not without bound
    patience.saw(drafted=0, kept=0, count=720)  # a pass without drafts says nothing
    assert not patience.drafts_at(763) and patience.drafts_at(764)
    patience.saw(drafted=2, kept=1, count=766)
    patience.saw(drafted=2, kept=0, count=767)
    assert patience.drafts_at(767)


@pytest.mark.parametrize(
    "seed, rules", [(7, RULES[::3]), *nightly(*((seed, RULES) for seed in range(20)))]
)
def test_texts_are_what_they_are_alone_without(model, restless, seed, rules):
    """Drawn arrivals, lengths, rules and cancellations, far beyond the windows."""
    engine = Engine(model, slots=3, context=64, chunk=16, burst=3, speculation=EAGER)
    random, asked, tickets = np.random.default_rng(seed), [], []
    for n in range(12):
        one = drawn(n, random, rules)
        ticket, answer = submitted(engine, one)
        asked.append((one, answer))
        tickets.append(ticket)
        for _ in range(random.integers(3)):
            engine.step()
    gone = {3, 8}
    for n in gone:
        tickets[n].cancel()
    run(engine)
    assert_as_offline(model, asked, gone)
    stats = engine.stats()
    assert 0 < stats["kept_tokens"] < stats["drafted_tokens"]


@pytest.mark.parametrize(
    "family, layout, runtime",
    nightly(
        ("gemma3n", "unrolled", {}),
        ("gemma2", "scan", {}),
        ("gemma3", "scan", dict(attention_impl="reference")),
        ("gemma3", "unrolled", dict(attention_impl="xla")),
    ),
)
def test_drafts_in_every_family(restless, family, layout, runtime):
    model = tiny.model(tiny.FAMILIES[family](), layout, **runtime)
    engine = Engine(model, slots=2, context=64, chunk=16, speculation=EAGER)
    random, asked = np.random.default_rng(3), []
    # Without draws a random model soon says the same again, which is what drafts are good for.
    for one in [
        *(request(n, 40, stop_ids=(5, 9)) for n in (4, 5, 6)),
        *(drawn(n, random, RULES) for n in range(5)),
    ]:
        asked.append((one, submitted(engine, one)[1]))
        engine.step()
    run(engine)
    assert_as_offline(model, asked)
    assert engine.stats()["kept_tokens"] > 0


@pytest.mark.nightly
def test_nothing_compiles_after_warming_up_with_drafts(model, compilations):
    engine = Engine(model, slots=2, context=64, chunk=16, speculation=EAGER)
    engine.warm_up()
    assert len(engine.programs()) == len(set(engine.programs())) == 27
    compilations.clear()
    for n, rules in enumerate(RULES):
        submitted(engine, request(20, 9, sampling=rules, top_log_probs=n, seed=n))
        engine.step()
    run(engine)
    assert engine.stats()["drafted_tokens"] > 0 and not compilations


class Forced(Listed):
    """Knows where it leaves no choice, too."""

    def forced(self):
        out = []
        while True:
            n = len(self.at) + len(out)
            next_ = {text[n : n + 1] for text in self.texts if [*self.at, *out] == [*text[:n]]}
            if len(next_) != 1 or not (only := next_.pop()):
                return out
            out += only

    def rewind(self, count):
        del self.at[len(self.at) - count :]


TEXTS = (7, 40, 41, 80, 81, 82, 83, 84, 85), (7, 60, 61, 62, 80, 81, 82)


@pytest.mark.parametrize("speculation", [None, EAGER])
def test_tokens_without_a_choice_are_read_in_one_pass(model, speculation):
    passes, texts = [], []
    for kind in (Listed, Forced):
        engine = Engine(model, slots=2, context=64, chunk=16, speculation=speculation)
        free = request(12, 15, sampling=RULES[1])
        held = request(6, 12, constraint=kind(*TEXTS), stop_ids=(1,), seed=3, sampling=RULES[1])
        kind.rewind = Forced.rewind
        (_, answer), (_, other) = submitted(engine, held), submitted(engine, free)
        run(engine)
        assert tuple(answer.ids[:-1]) in TEXTS and answer.reason == "stop"
        assert_alone(model, free, other)
        texts.append((answer.ids, np.round(answer.log_probs, 3).tolist()))
        passes.append(len(answer))
    assert texts[0] == texts[1] and passes[1] < passes[0]


def test_a_look_ahead_leaves_a_constraint_where_it_was():
    constraint = Forced(*TEXTS)
    constraint.accept([7, 60])
    out = next_tokens(constraint, 3, [80, 81, 9, 7, 60], None)
    assert constraint.at == [7, 60]
    assert (out.drafts, out.forced, out.masks.shape[0]) == ([61, 62, 80], 3, 4)
    words = [int(np.flatnonzero(np.unpackbits(m.view(np.uint8), bitorder="little"))[0])
             for m in out.masks]  # fmt: skip
    assert words == [61, 62, 80, 81]
    looked = next_tokens(Forced((5, 6, 7), (5, 6, 8), (5, 9)), 3, [5, 6, 8, 5, 6, 9, 5], EAGER)
    assert (looked.drafts, looked.forced) == ([5, 6], 1)  # 9 is not legal there


def follows(first):
    """A grammar: behind each token, six of ten."""
    return (np.arange(10) - np.asarray(first)[..., None]) % 10 % 7 > 0


@pytest.mark.parametrize("grammar", [True, *nightly(False)])
def test_drafted_text_is_distributed_as_the_models(grammar):
    """Second and third token of 2,000 texts, by chi-square; the same two drafts behind each first.

    With a grammar, drafts are checked by the masks of their own places.
    """
    model = tiny.model(replace(CFG, vocab_size=10, final_soft_cap=None), "unrolled")
    sampling, count, prompt = gj.Sampling(temperature=0.8, top_p=0.95, min_p=0.01), 2000, [3, 5, 7]
    session = gj.Session(model, count, 16, sampling=sampling, seeds=list(range(count)))
    session.prefill([prompt] * count, max_new_tokens=8)
    state, kept = session._state, []
    for step in (1, 2):
        last = np.array(state.last_B)
        drafts = (last[:, None] + np.array([1, 3][: 4 - 2 * step])) % 10
        places = np.concatenate([last[:, None], drafts], axis=1)
        bits = follows(places) if grammar else np.ones((*places.shape, 10), bool)
        words = np.sum(bits * 2 ** np.arange(10), axis=-1, keepdims=True).astype(np.uint32)
        before = np.array(state.step_B)
        given = GivenDrafts(drafts.astype(np.int32), np.full(count, drafts.shape[1], np.int32))
        state = advance(
            model, replace(state, limit_B=np.full(count, step + 1, np.int32)), None, loop=True,
            first=given, allow=LegalTokens(words, 10),
        )  # fmt: skip
        kept.append(np.array(state.step_B) - before - 1)
    texts = np.array(state.tokens_BX)
    seen = np.bincount(texts[:, 1] * 10 + texts[:, 2], minlength=100)
    assert 0.05 < kept[0].mean() < 1.5
    firsts = np.arange(100)
    legal = np.ones((100, 3, 10), bool)
    legal[:, 1], legal[:, 2] = follows(firsts // 10), follows(firsts % 10)
    assert p_value(seen, pairs(model, prompt, sampling, legal if grammar else None)) > 1e-3
    assert p_value(seen, pairs(model, prompt, sampling, None if grammar else legal)) < 1e-6
