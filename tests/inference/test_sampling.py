"""Choosing tokens: every rule by itself, seeds, and impossible values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax import Sampling
from gemma_jax.inference.sampling import SamplingRows, best, distribution, penalised, sample

PROBS = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
LOGITS = jnp.log(jnp.asarray(PROBS, jnp.float32))
DRAWS = 4000


def rows(count, vocab_size=len(PROBS), **fields):
    return SamplingRows.of([Sampling(**fields)] * count, vocab_size)


def draw(seen=None, **fields):
    """Frequencies of many draws from `PROBS`."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    logits = jnp.tile(LOGITS, (DRAWS, 1))
    seen = None if seen is None else jnp.tile(jnp.asarray(seen), (DRAWS, 1))
    rules = rows(DRAWS, **{"temperature": 1.0, **fields})
    tokens = jax.jit(sample)(penalised(logits, seen, rules), keys, rules)
    return np.bincount(tokens, minlength=len(PROBS)) / DRAWS


def assert_drawn_from(frequencies, weights):
    expected = np.asarray(weights) / np.sum(weights)
    deviation = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(frequencies - expected) <= 5 * deviation).all()  # exact where never drawn


@pytest.mark.parametrize(
    "fields, weights",
    [
        (dict(), PROBS),
        (dict(temperature=0.5), PROBS**2),
        (dict(temperature=2.0), PROBS**0.5),
        (dict(top_k=2), [0.5, 0.25, 0, 0, 0]),
        (dict(top_k=99), PROBS),
        (dict(top_p=0.75), [0.5, 0.25, 0, 0, 0]),  # the fewest that reach it
        (dict(top_p=0.76), [0.5, 0.25, 0.15, 0, 0]),
        (dict(top_p=1e-6), [1, 0, 0, 0, 0]),  # never nothing
        (dict(min_p=0.2), [0.5, 0.25, 0.15, 0, 0]),  # at least a fifth of 0.5
        (dict(min_p=1.0), [1, 0, 0, 0, 0]),
        (dict(top_k=3, top_p=0.8), [0.5, 0.25, 0, 0, 0]),  # top-p within what top-k left
        (dict(top_k=1), [1, 0, 0, 0, 0]),
    ],
)
def test_rules(fields, weights):
    if fields == dict(top_p=0.75):  # the float32 sum of 0.5 and 0.25 is exact, that of exp(log) not
        fields = dict(top_p=0.7499)
    assert_drawn_from(draw(**fields), weights)


def test_few_candidates_stand_for_a_large_vocabulary():
    """Where they hold all that top-p keeps; else, or beside a row where they do not, it is sorted.
    Which of them it was, no row can tell."""
    V, rules = 5000, dict(temperature=1.0, top_p=0.9)
    flat_V, steep_V = np.zeros(V), -0.01 * np.random.default_rng(0).permutation(V)
    keys = jax.random.split(jax.random.key(1), DRAWS)

    def drawn(*logits):
        logits_BV = jnp.tile(jnp.asarray(logits, jnp.float32), (DRAWS // len(logits), 1))
        tokens = jax.jit(sample)(logits_BV, keys, rows(DRAWS, V, **rules))
        return np.asarray(tokens).reshape(-1, len(logits))

    alone, beside = drawn(steep_V), drawn(steep_V, flat_V)
    np.testing.assert_array_equal(alone[::2, 0], beside[:, 0])
    order = np.argsort(-steep_V)
    kept = order[: np.searchsorted(np.cumsum(np.exp(steep_V[order]) * -np.expm1(-0.01)), 0.9) + 1]
    assert len(kept) == 231 and set(alone[:, 0]) <= set(kept)
    assert len(np.unique(alone)) > 0.9 * len(kept)
    flat = beside[:, 1]  # equal ones are kept in their order
    assert flat.max() < 0.9 * V + 1 and flat.max() > 0.89 * V


def test_repetition_penalty():
    """log-probabilities are negative, so the penalty multiplies: p becomes p ** penalty."""
    weights = PROBS.copy()
    weights[0] **= 2
    frequencies = draw(seen=[True, False, False, False, False], repetition_penalty=2.0)
    assert_drawn_from(frequencies, weights)


def test_repetition_penalty_divides_positive_logits():
    rules = rows(1, repetition_penalty=2.0)
    logits = jnp.array([[3.0, 2.0, 1.0]])
    seen = jnp.array([[True, False, False]])
    assert penalised(logits, seen, rules).tolist() == [[1.5, 2.0, 1.0]]


def test_greedy_takes_the_first_of_equals():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
    keys = jax.random.split(jax.random.key(0), 2)
    assert sample(logits, keys, rows(2)).tolist() == [1, 0]


def test_the_best_token_is_that_of_argmax():
    logits = np.random.default_rng(0).integers(-3, 3, (200, 37)).astype(np.float32)  # many equals
    logits[::3, ::2] = -np.inf
    logits[7] = -np.inf
    np.testing.assert_array_equal(jax.jit(best)(logits), logits.argmax(-1))
    np.testing.assert_array_equal(best(logits.reshape(4, 50, 37)), logits.argmax(-1).reshape(4, 50))


def test_a_draw_depends_on_its_own_key_alone():
    rules = dict(temperature=1.0, top_p=0.9)
    keys = jax.random.split(jax.random.key(3), 6)
    logits = jax.random.normal(jax.random.key(4), (6, 50))
    together = sample(logits, keys, rows(6, 50, **rules))
    alone = [sample(logits[i : i + 1], keys[i : i + 1], rows(1, 50, **rules))[0] for i in range(6)]
    assert together.tolist() == [int(token) for token in alone]


RULES = [
    dict(),
    dict(temperature=0.7),
    dict(temperature=1.0, top_k=3),
    dict(temperature=1.0, top_k=40),
    dict(temperature=1.3, top_p=0.8),
    dict(temperature=1.3, min_p=0.05),
    dict(temperature=1.0, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.5),
    dict(repetition_penalty=3.0),
]


def test_rules_of_one_row_do_not_change_those_of_another():
    """Also where the rows beside it make the program sort, or keep more candidates."""
    logits_BV = 2 * jax.random.normal(jax.random.key(4), (len(RULES), 50))
    seen_BV = jax.random.bernoulli(jax.random.key(5), 0.3, logits_BV.shape)
    each = [Sampling(**fields) for fields in RULES]
    together = SamplingRows.of(each, 50)
    for seed in range(20):
        keys_B = jax.random.split(jax.random.key(seed), len(RULES))
        mixed_B = sample(penalised(logits_BV, seen_BV, together), keys_B, together).tolist()
        for i, sampling in enumerate(each):
            row = slice(i, i + 1)
            alone = SamplingRows.of([sampling], 50)
            own_BV = penalised(logits_BV[row], seen_BV[row], alone)
            assert mixed_B[i] == sample(own_BV, keys_B[row], alone).item()


def test_a_greedy_row_is_certain_among_rows_that_draw():
    logits_BV = jnp.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    rules = SamplingRows.of([Sampling(), Sampling(temperature=1.0)], 3)
    p_BV = np.exp(distribution(logits_BV[:, None], rules)[:, 0])
    np.testing.assert_array_equal(p_BV[0], [0, 1, 0])
    np.testing.assert_allclose(p_BV[1], jax.nn.softmax(logits_BV[1]), rtol=1e-6)


LIMITS = [0.0, 5e-324, 1e-300, 1e-45, 1.2e-38, 1e-30, 1e-20, 1e-10, 1e10, 1e20]


@pytest.mark.parametrize("temperature", LIMITS)
@pytest.mark.parametrize("rules", [{}, {"top_k": 2}, {"top_p": 1e-300}, {"min_p": 1e-300}])
def test_temperatures_at_the_limits_of_float32(temperature, rules):
    """Below what float32 can divide by, the most probable token; above, never another order."""
    logits_BV = jnp.tile(jnp.array([-5.0, 0.0, 30.0, 29.0, -jnp.inf]), (64, 1))
    keys = jax.random.split(jax.random.key(0), 64)
    rows_ = rows(64, temperature=temperature, **rules)
    tokens = set(jax.jit(sample)(logits_BV, keys, rows_).tolist())
    if temperature <= 1e-10 or "top_p" in rules:
        assert tokens == {2}
    else:
        assert tokens == ({2, 3} if "top_k" in rules else {0, 1, 2, 3})


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(temperature=1e39), "temperature=1e\\+39 must be between 0 and 1e\\+20"),
        (dict(repetition_penalty=1e-45), "repetition_penalty=1e-45 must be"),
        (dict(repetition_penalty=1e39), "repetition_penalty=1e\\+39 must be"),
        (dict(temperature=-1.0), "temperature=-1.0 must be between 0 and 1e\\+20"),
        (dict(temperature=float("nan")), "temperature=nan must be"),
        (dict(temperature=float("inf")), "temperature=inf must be"),
        (dict(top_k=-1), "top_k=-1 must be an integer, 0 or more"),
        (dict(top_k=2.5), "top_k=2.5 must be an integer"),
        (dict(top_p=0.0), "top_p=0.0 must be above 0 and at most 1"),
        (dict(top_p=1.5), "top_p=1.5 must be"),
        (dict(min_p=-0.1), "min_p=-0.1 must be between 0 and 1"),
        (dict(repetition_penalty=0.0), "repetition_penalty=0.0 must be between 1e-20"),
    ],
)
def test_impossible_values(fields, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**fields)
