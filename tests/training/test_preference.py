"""Preference objectives: references, packed pairs, and what they cost."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from intermediates import largest_intermediate

import gemma_jax as gj
from gemma_jax.quantisation import quantise
from gemma_jax.training.model_pair import ModelPair, pair_with
from gemma_jax.training.objectives import TrainBatch
from gemma_jax.training.preference import (
    KINDS,
    PreferenceBatch,
    compare,
    completion_logps,
    dpo,
    preferences,
)
from gemma_jax.training.quantisation_aware import quantisation_aware
from gemma_jax.training.step import make_step
from gemma_jax.training.trainable import trainable
from gemma_kernels.cross_entropy import xla

CFG = replace(tiny.gemma1(), layers=tiny.gemma1().layers[:2])
TOKENS = tiny.tokens(CFG, 4, 10)
ANSWERS = (np.arange(10) >= np.array([[4], [6], [4], [6]])).astype(np.float32)
BATCH = PreferenceBatch(TrainBatch(TOKENS, weights_BT=ANSWERS))


@pytest.fixture(scope="module")
def models():
    return tiny.model(CFG), tiny.model(CFG, seed=1)


def norms(path, param):
    return "scale" in path


def test_a_reference_is_the_same_from_wherever_it_comes(models):
    policy, reference = models
    logps, _ = completion_logps(reference, BATCH.rows)
    losses = [
        dpo(ModelPair(policy, reference), BATCH)[0],
        dpo(policy, BATCH, reference=lambda model: reference)[0],
        dpo(policy, replace(BATCH, reference_logps_B=logps[:, 0]))[0],
    ]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    assert abs(losses[0] - np.log(2)) > 0.01


def test_no_gradient_goes_through_the_reference(models):
    policy, reference = models
    grad = jax.jit(jax.grad(lambda pair: dpo(pair, BATCH)[0]))
    assert all(np.any(g) for g in jax.tree.leaves(grad(ModelPair(policy, reference)).model))
    ours = grad(ModelPair(policy, policy))
    assert not any(np.any(g) for g in jax.tree.leaves(ours.other))
    theirs = jax.jit(jax.grad(lambda policy: dpo(policy, BATCH, reference=lambda m: m)[0]))(policy)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), ours.model, theirs)


def test_metrics_say_what_the_pairs_are(models):
    pair = ModelPair(*models)
    found = preferences(pair, BATCH, beta=0.5)
    _, metrics = dpo(pair, BATCH, beta=0.5)
    assert metrics["pairs"] == 2
    margins = found.rewards_chosen - found.rewards_rejected
    np.testing.assert_allclose(metrics["margins"], margins.mean(), rtol=1e-6)
    assert metrics["accuracy"] == (margins > 0).mean()
    logps, _ = completion_logps(pair.model, BATCH.rows)
    np.testing.assert_allclose(metrics["logps_rejected"], logps[2:].mean(), rtol=1e-6)


def test_pairs_without_answers_do_not_count(models):
    pair = ModelPair(*models)
    answers = ANSWERS * np.array([[1], [0], [1], [0]], np.float32)
    filled = PreferenceBatch(TrainBatch(TOKENS, weights_BT=answers))
    alone = PreferenceBatch(TrainBatch(TOKENS[::2], weights_BT=ANSWERS[::2]))
    for kind in KINDS:
        losses = [dpo(pair, batch, kind=kind) for batch in (filled, alone)]
        np.testing.assert_allclose(losses[0][0], losses[1][0], rtol=1e-5)
        assert losses[0][1]["pairs"] == losses[1][1]["pairs"] == 1


def test_packed_pairs_are_separate_pairs(models):
    """Two documents in each row, of other lengths on each side: of 4 and 6 tokens, of 7 and 3."""
    pair, cut = ModelPair(*models), (4, 7)
    documents = np.array([np.repeat([1, 2], [at, 10 - at]) for at in cut])
    answers = np.ones((2, 10), np.float32)
    answers[0, [0, 1, 4]] = answers[1, [0, 1, 2, 7]] = 0
    packed = TrainBatch(gj.Batch(TOKENS[:2], documents_BT=documents), weights_BT=answers)
    tokens, positions = np.zeros((4, 7), np.int32), np.full((4, 7), -1, np.int32)
    weights = np.zeros((4, 7), np.float32)
    for side, at in enumerate(cut):
        for document, part in enumerate((slice(at), slice(at, None))):
            row, ids = 2 * side + document, TOKENS[side, part]
            tokens[row, : len(ids)], positions[row, : len(ids)] = ids, np.arange(len(ids))
            weights[row, : len(ids)] = answers[side, part]
    separate = TrainBatch(gj.Batch(tokens, positions), weights_BT=weights)

    @jax.jit
    def run(model, rows):
        def loss(model):
            return dpo(ModelPair(model, pair.other), PreferenceBatch(rows), kind="ipo")

        return jax.value_and_grad(loss, has_aux=True)(model)

    ours, theirs = run(pair.model, packed), run(pair.model, separate)
    assert ours[0][1]["pairs"] == 2
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), ours, theirs)
    logps, _ = completion_logps(pair.other, packed)
    stored = PreferenceBatch(packed, reference_logps_B=logps[:, :3])
    np.testing.assert_allclose(dpo(pair.model, stored, kind="ipo")[0], ours[0][0], rtol=1e-5)


def test_arrays_of_the_reference_are_arguments_of_the_program():
    cfg = replace(CFG, vocab_size=2**14)
    policy, reference = tiny.model(cfg), tiny.model(cfg, seed=1)
    trained, frozen, join = pair_with(trainable(policy, norms), reference)
    init, step = make_step(dpo, optax.sgd(0.1), join)
    state = init(trained, jax.random.key(0))
    text = jax.jit(step).lower(state, frozen, BATCH).as_text()  # constants are written out in full
    assert len(text) < sum(leaf.nbytes for leaf in jax.tree.leaves(reference))


@pytest.mark.parametrize("objective", [dpo, quantisation_aware(dpo, "int8")], ids=["", "int8"])
def test_steps_make_the_chosen_answers_likelier(objective, models):
    policy, _ = models
    trained, frozen, join = pair_with(trainable(policy), policy)
    init, step = make_step(objective, optax.adam(1e-2), join)
    state, step = init(trained, jax.random.key(0)), jax.jit(step)
    for _ in range(4):
        state, metrics = step(state, frozen, BATCH)
    assert metrics["loss"] < 0.6 and metrics["margins"] > 0
    jax.tree.map(np.testing.assert_array_equal, join(state.trained, frozen).other, policy)


def test_a_quantised_policy_and_reference(models):
    policy, reference = (quantise(model, "int8") for model in models)
    trained, frozen, join = pair_with(trainable(policy, norms), reference)
    gradients = jax.jit(jax.grad(lambda trained: dpo(join(trained, frozen), BATCH)[0]))(trained)
    assert all(np.any(gradient) for gradient in gradients.values())


def test_logits_never_exist_at_one_time(monkeypatch):
    monkeypatch.setattr(xla, "SMALLEST_CHUNK", 64)
    monkeypatch.setattr(xla, "CPU_TILE_BYTES", 1)
    cfg = replace(CFG, vocab_size=1024)
    model = tiny.model(cfg)
    run = jax.value_and_grad(lambda model: dpo(ModelPair(model, model), BATCH)[0])
    assert largest_intermediate(run, model) < TOKENS.size * cfg.vocab_size


numbers = st.lists(st.floats(-60, 0), min_size=4, max_size=4)


@given(numbers, numbers, st.floats(0.01, 2), st.floats(0, 0.4))
@settings(max_examples=50, deadline=None)
def test_what_the_losses_are_made_for(ours, theirs, beta, eps):
    logps, reference = (jnp.array(x, jnp.float32)[:, None] for x in (ours, theirs))
    swapped = [jnp.roll(x, 2, axis=0) for x in (logps, reference)]
    tokens = jnp.full((4, 1), 5.0)

    def losses(kind, pair=(logps, reference), eps=0.0):
        return compare(pair[0], tokens, pair[1], kind=kind, beta=beta, label_smoothing=eps).losses

    plain = losses("sigmoid")
    assert (plain >= 0).all()
    np.testing.assert_allclose(losses("smoothed"), plain, rtol=1e-5)
    np.testing.assert_allclose(losses("robust"), plain, rtol=1e-5)
    # Robust: of pairs that are swapped as often as it says, the mean is that of right ones.
    mean = (1 - eps) * losses("robust", eps=eps) + eps * losses("robust", swapped, eps)
    np.testing.assert_allclose(mean, plain, rtol=1e-3, atol=1e-3)
    # Smoothed: the mean over such pairs of the plain loss.
    mean = (1 - eps) * plain + eps * losses("sigmoid", swapped)
    np.testing.assert_allclose(losses("smoothed", eps=eps), mean, rtol=1e-4, atol=1e-5)
    # The two readings of IPO differ by the length of the answers alone.
    scaled = compare(logps / 5, tokens, reference / 5, kind="ipo_sums", beta=beta).losses
    np.testing.assert_allclose(losses("ipo"), scaled, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "hinge"}, "kind='hinge' must be 'sigmoid', 'smoothed'"),
        ({"beta": 0}, "beta=0 must be above 0"),
        ({"kind": "robust", "label_smoothing": 0.5}, r"must lie in \[0, 0.5\)"),
        ({"label_smoothing": 0.1}, "label_smoothing=0.1 is not part of kind='sigmoid'"),
        ({"reference": "adapters_off"}, "must be a function from a model to its reference"),
        ({"reference": lambda model: model}, "expected one reference, got the reference of a Mod"),
    ],
)
def test_impossible_options_are_refused(options, message, models):
    with pytest.raises(ValueError, match=message):
        dpo(ModelPair(*models), BATCH, **options)


def test_what_is_no_pair_is_refused(models):
    with pytest.raises(ValueError, match="expected one reference, got none; give one of"):
        dpo(models[0], BATCH)
    odd = PreferenceBatch(TrainBatch(TOKENS[:3], weights_BT=ANSWERS[:3]))
    with pytest.raises(ValueError, match="3 rows are no pairs"):
        dpo(ModelPair(*models), odd)
    stored = replace(BATCH, reference_logps_B=np.zeros(3))
    with pytest.raises(ValueError, match=r"shape \[3\] for 4 rows; expected \[4\]"):
        dpo(models[0], stored)
