"""Several small batches in one step; steps whose numbers are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from gemma_jax.decoder.batch import Batch
from gemma_jax.multimodal.media import Media
from gemma_jax.training.accumulate import stack_micro_batches
from gemma_jax.training.objectives import TrainBatch, next_token
from gemma_jax.training.step import make_step
from gemma_jax.training.trainable import trainable

CFG = tiny.gemma3(layers=2)  # alike: one is compiled
TOKENS = tiny.tokens(CFG, 3, 9)
WEIGHTS = np.ones((3, 9), np.float32)
WEIGHTS[0, 3:] = 0  # rows of unlike content: the mean of means is another number


def after(batch, objective=next_token, model=None, **options):
    trained, frozen, join = trainable(model or tiny.model(CFG))
    init, step = make_step(objective, optax.adam(1e-2), join, **options)
    state = init(trained, jax.random.key(0))
    return jax.jit(step)(state, frozen, batch)


def stacked(*cuts):
    """The rows in micro-batches."""
    return stack_micro_batches(
        [TrainBatch(TOKENS[cut], weights_BT=WEIGHTS[cut]) for cut in map(slice, *zip(*cuts))]
    )


def test_micro_batches_are_the_batch():
    whole, expected = after(TrainBatch(TOKENS, weights_BT=WEIGHTS))
    state, metrics = after(stacked((0, 1), (1, 3)), micro_batches=2)
    for name in expected:
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, err_msg=name)
    assert metrics["tokens"] == 18
    moments = [s.moments[0].mu for s in (state, whole)]
    for ours, theirs in zip(*map(jax.tree.leaves, moments)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    halves = [
        next_token(tiny.model(CFG), TrainBatch(TOKENS[cut], weights_BT=WEIGHTS[cut]))[0]
        for cut in (slice(0, 1), slice(1, 3))
    ]
    assert abs(np.mean(halves) - metrics["loss"]) > 1e-3


def test_a_micro_batch_without_targets_adds_nothing():
    def divides(model, batch, key):
        """A mean as it is often written: it divides by how many there are."""
        value, metrics = next_token(model, batch, key)
        return value * metrics["tokens"] / jnp.sum(batch.weights_BT[:, 1:]), metrics

    nothing = stack_micro_batches(
        [TrainBatch(TOKENS[:1], weights_BT=w * WEIGHTS[1:2]) for w in (1, 0)]
    )
    state, metrics = after(nothing, divides, micro_batches=2)
    alone, expected = after(TrainBatch(TOKENS[:1], weights_BT=WEIGHTS[1:2]))
    assert metrics["finite"] and state.step == 1
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.trained, alone.trained
    )


def test_a_step_in_which_nothing_counts_is_finite():
    nothing = stack_micro_batches([TrainBatch(TOKENS, weights_BT=0 * WEIGHTS)] * 2)
    _, metrics = after(nothing, micro_batches=2)
    assert metrics["finite"] and metrics["loss"] == 0 and metrics["tokens"] == 0


def test_metrics_are_weighted_as_the_loss_is():
    def objective(model, batch, key):
        value, metrics = next_token(model, batch, key)
        return value, {"tokens": metrics["tokens"], "same": value, "draw": jax.random.uniform(key)}

    _, metrics = after(stacked((0, 1), (1, 3)), objective, micro_batches=2)
    np.testing.assert_allclose(metrics["same"], metrics["loss"], rtol=1e-6)
    _, pairs = after(
        stacked((0, 1), (1, 3)),
        lambda m, b, k: (next_token(m, b, k)[0], {"pairs": jnp.sum(b.weights_BT[:, 0])}),
        micro_batches=2,
    )
    assert pairs["pairs"] == 3


def test_gradients_of_narrow_parameters_add_up_in_float32():
    model = jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny.model(CFG))
    seen = []

    def update(gradients, state, params):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(gradients))
        return jax.tree.map(jnp.zeros_like, params), state

    trained, frozen, join = trainable(model)
    nothing = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    init, step = make_step(next_token, nothing, join, micro_batches=2)
    jax.eval_shape(step, init(trained, jax.random.key(0)), frozen, stacked((0, 1), (1, 3)))
    assert set(seen) == {jnp.dtype("float32")}


def test_arrays_without_the_axis_are_refused_by_name():
    with pytest.raises(ValueError, match=r"tokens_BT has shape \[3, 9\], expected \[2, \.\.\.\]"):
        after(TrainBatch.of(TOKENS), micro_batches=2)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("what", ["loss", "gradients"])
def test_numbers_that_are_not_finite_leave_the_state_alone(what, skip):
    def objective(model, batch, key):
        value, metrics = next_token(model, batch, key)
        if what == "loss":
            return value + jnp.nan, metrics
        zero = jnp.sum(model.final_norm.scale[...]) * 0
        return value + jnp.sqrt(zero), metrics  # 0, whose derivative is 1 / 0

    trained = trainable(tiny.model(CFG)).trained
    state, metrics = after(TOKENS, objective, skip_nonfinite=skip)
    assert not metrics["finite"]
    assert np.isfinite(metrics["loss"]) == (what == "gradients")
    same = [np.array_equal(state.trained[path], trained[path]) for path in trained]
    assert all(same) if skip else not any(same)
    assert state.step == (0 if skip else 1)


def test_items_of_several_modalities_are_not_filled_up():
    """Whose indices count through all images first, then through the sounds."""
    ids = np.full((1, 3), 5)

    def batch(images, sounds):
        items = {"image": np.zeros((images, 3, 4, 4)), "audio": np.zeros((sounds, 8, 4))}
        return TrainBatch(Batch(ids), media=Media(inputs=items, index_BT=np.full((1, 3), -1)))

    assert stack_micro_batches([batch(1, 2), batch(1, 2)]).media.inputs["audio"].shape[:2] == (2, 2)
    with pytest.raises(ValueError, match=r"batches with \[1, 2\] and \[2, 2\] items"):
        stack_micro_batches([batch(1, 2), batch(2, 2)])
