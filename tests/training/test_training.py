"""Pieces of a training loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

import gemma_jax as gj
from gemma_jax.training.optimizers import muon
from gemma_jax.training.params import trainable


def test_parameters_go_out_and_come_back():
    model = tiny.model(tiny.gemma1())
    params, rebuild = trainable(model)
    again = rebuild(params)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(again), jax.tree.leaves(model))
    changed = rebuild({path: value + 1 for path, value in params.items()})
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(model)))


def test_a_few_steps_of_muon_lower_the_loss():
    cfg = tiny.gemma1()
    model, tokens = tiny.model(cfg), tiny.tokens(cfg, 2, 12)
    params, rebuild = trainable(model)
    optimizer = muon(model, 0.02)

    def loss(params):
        logits = gj.forward(rebuild(params), tokens).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, values = optimizer.init(params), []
    for _ in range(8):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]


def test_muon_takes_the_linear_maps_and_no_table_or_norm():
    model = tiny.model(tiny.gemma1())
    params, _ = trainable(model)
    state = muon(model, 0.02).init(params)
    moments = state.inner_states["adam"].inner_state[0].mu
    adam = {path for path, leaf in moments.items() if isinstance(leaf, jnp.ndarray)}
    names = {path: ".".join(map(str, path)) for path in params}
    assert {names[p] for p in adam} == {
        name for name in names.values() if "norm" in name or "table" in name
    }
