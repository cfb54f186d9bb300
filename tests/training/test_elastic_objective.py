"""Elastic training: widths drawn in the step, and models inside that learn from the whole."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from marks import nightly

import gemma_jax as gj
from gemma_jax.matformer import Slice, at
from gemma_jax.training.objectives import TrainBatch, elastic, next_token
from gemma_jax.training.quantisation_aware import quantisation_aware
from gemma_jax.training.step import make_step
from gemma_jax.training.trainable import trainable

CFG = replace(tiny.gemma1(), layers=tiny.gemma1().layers[:2])
LAYERS = len(CFG.layers)
TOKENS = tiny.tokens(CFG, 2, 9)
WIDTHS = (8, 24, 48)


def drawn(seed, same=False):
    key = jax.random.key(seed)
    return jax.random.choice(key, jnp.array(WIDTHS), () if same else (LAYERS,))


@pytest.mark.parametrize("same", [False, True])
def test_widths_are_drawn_from_the_key(same):
    model = tiny.model(CFG)
    run = jax.jit(partial(elastic, widths=WIDTHS, same_width=same))
    for seed in (0, 1, 2):
        loss, metrics = run(model, TOKENS, jax.random.key(seed))
        widths = jnp.broadcast_to(drawn(seed, same), LAYERS)
        narrow, _ = next_token(model, gj.Batch(TOKENS, ffn_widths_L=widths))
        whole, _ = next_token(model, TOKENS)
        np.testing.assert_allclose(metrics["narrow"], narrow, rtol=1e-5)
        np.testing.assert_allclose(loss, (whole + narrow) / 2, rtol=1e-5)
        np.testing.assert_allclose(metrics["mean_width"], widths.mean(), rtol=1e-6)
    assert run._cache_size() == 1
    assert len({tuple(drawn(seed).tolist()) for seed in range(20)}) > 5


@pytest.mark.parametrize("layout", ["unrolled", *nightly("scan")])
def test_models_inside_learn_from_the_whole(layout):
    """In packed rows, with weights. No gradient goes to the whole, though all share its arrays."""
    model = tiny.model(CFG, layout)
    documents = np.repeat([[1, 2]], [4, 5], axis=1).repeat(2, axis=0)
    widths, half = drawn(0), Slice(ffn_widths=(24,) * LAYERS)
    submodels = (half,) if layout == "unrolled" else ()
    weights = np.ones(TOKENS.shape, np.float32)
    weights[0, 6] = 0.5
    batch = TrainBatch(gj.Batch(TOKENS, documents_BT=documents), weights_BT=weights)
    counts = np.pad(weights[:, 1:], ((0, 0), (0, 1)))
    counts[:, 3] = 0

    def expected(model):
        plain = gj.Batch(TOKENS, documents_BT=documents)
        narrow = gj.Batch(TOKENS, documents_BT=documents, ffn_widths_L=widths)
        logp = jax.nn.log_softmax(jax.lax.stop_gradient(gj.forward(model, plain).logits) / 2)
        losses, labels = [], []
        for part, read in [*((at(model, s), plain) for s in submodels), (model, narrow)]:
            logq = jax.nn.log_softmax(gj.forward(part, read).logits / 2)
            kl = jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)
            losses.append(jnp.sum(kl * counts) / counts.sum())
            labels.append(next_token(part, TrainBatch(read, weights_BT=weights))[0])
        mixed = [0.75 * kl + 0.25 * label for kl, label in zip(losses, labels)]
        whole, _ = next_token(model, batch)
        return (whole + sum(mixed)) / (1 + len(mixed))

    def ours(model):
        return elastic(
            model,
            batch,
            jax.random.key(0),
            submodels=submodels,
            widths=WIDTHS,
            alpha=0.75,
            temperature=2.0,
        )

    (loss, metrics), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(model)
    value, theirs = jax.jit(jax.value_and_grad(expected))(model)
    np.testing.assert_allclose(loss, value, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5), gradient, theirs)
    names = {"narrow", "narrow_divergence"} | (
        {"slice_0", "slice_0_divergence"} if submodels else set()
    )
    assert metrics.keys() == {"whole", "tokens", "mean_width"} | names
    assert metrics["tokens"] == counts.sum()


def test_with_all_of_it_there_are_no_labels_inside():
    _, metrics = elastic(tiny.model(CFG), TOKENS, jax.random.key(0), widths=WIDTHS, alpha=1.0)
    assert metrics.keys() == {"whole", "narrow_divergence", "mean_width", "tokens"}
    assert metrics["narrow_divergence"] > 0


def test_steps_of_one_program_draw_anew():
    trained, frozen, join = trainable(tiny.model(CFG))
    objective = quantisation_aware(partial(elastic, widths=WIDTHS, alpha=0.5), "int8")
    init, step = make_step(objective, optax.adam(1e-2), join)
    state, step = init(trained, jax.random.key(0)), jax.jit(step)
    found = []
    for _ in range(6):
        state, metrics = step(state, frozen, TOKENS)
        found.append({name: float(value) for name, value in metrics.items()})
    assert step._cache_size() == 1 and len({one["mean_width"] for one in found}) > 2
    assert found[-1]["whole"] < found[0]["whole"] and found[-1]["narrow"] < found[0]["narrow"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"widths": (64,)}, "width 64 is more than the 48 channels of a layer"),
        ({"widths": (0,)}, r"widths=\[0\] must be whole numbers of channels, at least 1"),
        ({"widths": (0.5,)}, "must be whole numbers of channels"),
        ({"alpha": -1}, r"alpha=-1 must lie in \[0, 1\]"),
        ({"kind": "kl"}, "kind='kl' must be 'forward_kl'"),
        ({"widths": WIDTHS, "key": None}, "widths are drawn with a key"),
        (
            {"widths": WIDTHS, "batch": gj.Batch(TOKENS, ffn_widths_L=np.full(LAYERS, 8))},
            "the batch has ffn_widths_L already",
        ),
    ],
)
def test_impossible_options_are_refused(options, message):
    given = {"batch": TOKENS, "key": jax.random.key(0)} | options
    with pytest.raises(ValueError, match=message):
        elastic(tiny.model(CFG), **given)
