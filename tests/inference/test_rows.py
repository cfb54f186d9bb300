"""Rows that come and go: each says what it says alone, whatever happens beside it."""

import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from marks import nightly

from gemma_jax import Sampling, Session, forward
from gemma_jax.inference.speculation import SpeculativeSession
from gemma_jax.matformer import Slice

CFG = tiny.gemma3(2, every=2)  # windows of 8: texts below outgrow their rings
DRAFTS = {"own cache": Slice(ffn_widths=(24, 24)), "the model's": Slice(ffn_widths=(48, 4))}


@pytest.fixture(scope="module")
def model():
    return tiny.model(CFG, "unrolled")


def prompt(length):
    return tiny.tokens(CFG, 1, length, seed=length)[0].tolist()


def session_class(model, draft):
    """Of plain or speculative sessions with up to 64 tokens."""

    def make(batch, **options):
        if draft is None:
            return Session(model, batch, 64, **options)
        return SpeculativeSession(model, batch, 64, draft=DRAFTS[draft], draft_tokens=3, **options)

    return make


def alone(make, ids, new_tokens, *, seed=0, **options):
    session = make(1, seeds=[seed], **options)
    session.prefill([ids], max_new_tokens=new_tokens, run=True)
    return session.decode(new_tokens)[0], session.log_probs[0]


def assert_row(session, row, expected):
    tokens, log_probs = expected
    assert session.chosen[row] == tokens
    np.testing.assert_allclose(session.log_probs[row], log_probs, atol=2e-5)


@pytest.mark.parametrize("draft", [None, *nightly(*DRAFTS)])
def test_a_row_that_joins_late_says_what_it_says_alone(model, draft):
    make = session_class(model, draft)
    warm = Sampling(temperature=0.8, top_k=30)
    texts = {
        "first": (prompt(5), 20, dict(seed=1)),
        "second": (prompt(19), 12, dict(seed=2)),
        "third": (prompt(19)[::-1], 9, dict(seed=3, sampling=warm)),
    }
    expected = {name: alone(make, ids, n, **rest) for name, (ids, n, rest) in texts.items()}

    session = make(2, seeds=[1, 2])
    session.prefill([texts["first"][0], None], max_new_tokens=20)
    session.decode([7, 0])
    assert session.done == [False, True] and session.chosen[1] == []
    session.prefill([None, texts["second"][0]], max_new_tokens=12)  # while the first is on its way
    session.decode([10, 12])
    assert_row(session, 1, expected["second"])
    session.clear(1, sampling=warm, seed=3)
    assert session.chosen[1] == []
    session.prefill([None, texts["third"][0]], max_new_tokens=9)
    session.decode([20, 9])
    assert_row(session, 0, expected["first"])
    assert_row(session, 1, expected["third"])


def test_rows_with_rules_of_their_own(model):
    """Every sampling rule beside every other."""
    make = session_class(model, None)
    rules = [
        Sampling(),
        Sampling(temperature=1.0),
        Sampling(temperature=0.9, top_k=5, top_p=0.9),
        Sampling(temperature=1.2, min_p=0.02, repetition_penalty=1.4),
    ]
    session = make(4, sampling=rules, seeds=[5, 6, 7, 8])
    lengths = (10, 9, 14, 12)  # that one program reads
    session.prefill([prompt(n) for n in lengths], max_new_tokens=14)
    session.decode(14)
    for i, n in enumerate(lengths):
        assert_row(session, i, alone(make, prompt(n), 14, sampling=rules[i], seed=5 + i))


def test_limits_and_stop_ids_are_each_rows_own(model):
    make = session_class(model, None)
    texts = [prompt(4), prompt(13), prompt(4)]
    free = [alone(make, ids, 12)[0] for ids in texts]
    session = make(3, stop_ids=[free[1][6]])
    session.clear(0, stop_ids=[free[0][4]])
    session.clear(2, stop_ids=[])
    session.prefill(texts, max_new_tokens=12)
    chosen = session.decode([12, 12, 5])
    assert chosen[0] == free[0][: free[0].index(free[0][4]) + 1]
    assert chosen[1] == free[1][: free[1].index(free[1][6]) + 1]
    assert chosen[2] == free[2][:5]
    assert session.done == [True, True, False]
    assert session.decode(12)[2] == free[2]


def test_a_penalty_may_come_with_a_later_text(model):
    make, penalised = session_class(model, None), Sampling(repetition_penalty=1.5)
    session = make(2)
    session.prefill([prompt(5), prompt(9)], max_new_tokens=6, run=True)
    session.clear(1, sampling=penalised)
    session.prefill([None, prompt(7)], max_new_tokens=6)
    session.decode(6)
    assert_row(session, 0, alone(make, prompt(5), 6))
    assert_row(session, 1, alone(make, prompt(7), 6, sampling=penalised))


def test_clearing_a_row_forgets_it_and_nothing_else(model):
    session = Session(model, 2, 64)
    session.prefill([prompt(20), prompt(20)], max_new_tokens=4, run=True)
    before = jax.tree.map(np.asarray, session._state.cache)
    session.clear(0)
    after = session._state.cache
    for capacity, pos_BS in after.positions.items():
        assert (np.asarray(pos_BS)[0] == -1).all()
        np.testing.assert_array_equal(pos_BS[1], before.positions[capacity][1])
    assert after.length_B.tolist() == [0, 23] and session.done[0]


@pytest.mark.parametrize("draft", [*DRAFTS])
def test_drafts_go_on_from_turn_to_turn(model, draft):
    """What drafts brought beyond a turn's limit is taken back before the next."""
    turns = [(prompt(6), 5), (prompt(3), 8), (prompt(10), 7)]
    sessions = [session_class(model, None)(1), session_class(model, draft)(1)]
    for ids, new_tokens in turns:
        for session in sessions:
            session.prefill([ids], max_new_tokens=new_tokens)
            session.decode(new_tokens)
        assert_row(sessions[1], 0, (sessions[0].chosen[0], sessions[0].log_probs[0]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Alternate:
    """Odd ids after even ones and even after odd: what is legal depends on drafts, too."""

    def __call__(self, state, drafts_BX):
        odd_V = jnp.arange(CFG.vocab_size) % 2 == 1
        before_BT = jnp.concatenate([state.last_B[:, None], drafts_BX], axis=1)
        started_B = state.step_B > 0
        return ((before_BT[..., None] % 2 == 1) != odd_V) | ~started_B[:, None, None]


@pytest.mark.parametrize("draft", [None, *DRAFTS])
def test_only_legal_tokens_are_chosen(model, draft):
    if draft is None:
        session = Session(model, 1, 64, allow=Alternate())
    else:
        session = session_class(model, draft)(1)
        session.allow = Alternate()
    ids = prompt(6)
    session.prefill([ids], max_new_tokens=15)
    chosen = session.decode(15)[0]
    assert all(a % 2 != b % 2 for a, b in itertools.pairwise(chosen))

    logits_TV = forward(model, np.array([ids + chosen], np.int32)).logits[0, len(ids) - 1 :]
    log_p_TV = np.asarray(jax.nn.log_softmax(logits_TV))
    np.testing.assert_allclose(session.log_probs[0], log_p_TV[range(15), chosen], atol=2e-5)
    for before, log_p_V, token in zip(chosen, log_p_TV[1:], chosen[1:]):
        legal = np.arange(CFG.vocab_size) % 2 != before % 2
        assert token == np.argmax(np.where(legal, log_p_V, -np.inf))
    free = log_p_TV[:15].argmax(axis=1)
    assert (free != chosen).any()  # the model alone would have said something else


def test_wrong_numbers_of_things_for_rows(model):
    for options, message in (
        (dict(seeds=[1]), "1 seeds for 2 prompts"),
        (dict(sampling=[Sampling()] * 3), "3 sampling values for 2 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            Session(model, 2, 32, **options)
    session = Session(model, 2, 32)
    with pytest.raises(ValueError, match="1 limits for 2 prompts"):
        session.decode([3])
    with pytest.raises(ValueError, match="no text for any row"):
        session.prefill([None, None], max_new_tokens=3)
    with pytest.raises(ValueError, match="no repetition penalty"):
        SpeculativeSession(
            model, 2, 32, draft=DRAFTS["own cache"],
            sampling=[Sampling(), Sampling(repetition_penalty=1.2)],
        )  # fmt: skip
