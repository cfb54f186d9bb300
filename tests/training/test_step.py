"""The step of training: what it moves, what it leaves alone, and what it costs."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import gemma_jax as gj
from gemma_jax.matformer import Slice, at
from gemma_jax.placement import shard
from gemma_jax.quantisation import quantise
from gemma_jax.sharding import TRAINING, make_mesh
from gemma_jax.training.objectives import TrainBatch, elastic, next_token
from gemma_jax.training.optimizers import muon
from gemma_jax.training.state import TrainState
from gemma_jax.training.step import make_step
from gemma_jax.training.trainable import trainable

CFG = tiny.gemma3(layers=2)  # alike: one is compiled


def attention(path, param):
    return "attn" in path


def norms(path, param):
    return "scale" in path


def name(path):
    return ".".join(map(str, path))


def run(model, optimizer, batches, where=None, objective=next_token):
    """The state and metrics after some steps, and what was frozen."""
    trained, frozen, join = trainable(model, where)
    init, step = make_step(objective, optimizer, join)
    state, step, metrics = init(trained, jax.random.key(0)), jax.jit(step, donate_argnums=0), None
    for batch in batches:
        state, metrics = step(state, frozen, batch)
    return join(state.trained, frozen), state, metrics


def test_a_model_goes_out_and_comes_back():
    model = tiny.model(CFG)
    for where in (None, attention):
        trained, frozen, join = trainable(model, where)
        again = join(trained, frozen)
        jax.tree.map(np.testing.assert_array_equal, again, model)
        assert (trained.keys() | frozen.keys()) == trainable(model).trained.keys()
        assert not trained.keys() & frozen.keys()
    trained, frozen, join = trainable(model)
    assert not frozen
    changed = join({path: value + 1 for path, value in trained.items()}, frozen)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(model)))


def test_what_is_trained_moves_and_what_is_frozen_does_not():
    model, tokens = tiny.model(CFG), tiny.tokens(CFG, 2, 9)
    after, state, _ = run(model, optax.sgd(0.1), [tokens] * 2, attention)
    assert state.trained and all("attn" in path for path in state.trained)
    old, new = trainable(model).trained, trainable(after).trained
    for path in old:
        assert np.array_equal(old[path], new[path]) == ("attn" not in path), name(path)


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_frozen_weights_are_no_constants_of_the_program(storage):
    """They are its arguments. A step that closes over them would carry every byte of them."""
    cfg = replace(CFG, vocab_size=2**15)
    model, tokens = quantise(tiny.model(cfg), storage), tiny.tokens(cfg, 2, 9)
    trained, frozen, join = trainable(model, norms)
    init, step = make_step(next_token, optax.sgd(0.1), join)
    state = init(trained, jax.random.key(0))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    ours = jax.jit(step).lower(state, frozen, tokens)
    closed = jax.jit(lambda state, tokens: step(state, frozen, tokens)).lower(state, tokens)
    taken, closed_taken = (
        lowered.compile().memory_analysis().argument_size_in_bytes for lowered in (ours, closed)
    )
    assert taken - closed_taken == size > 1_000_000
    assert len(ours.as_text()) < size < len(closed.as_text())  # constants are written out in full


def test_nothing_keeps_the_model_alive_but_the_caller():
    """The way back holds the shape of the model and none of its arrays."""
    join = trainable(tiny.model(CFG), attention).join
    assert not jax.tree.leaves(join({}, {}))


def test_the_arrays_of_the_model_outlive_a_donated_state():
    model, key = tiny.model(CFG), jax.random.key(0)
    trained, frozen, join = trainable(model)
    init, step = make_step(next_token, optax.adam(1e-3), join)
    state = init(trained, key, data_position={"next_index": np.int32(7)})
    again, _ = jax.jit(step, donate_argnums=0)(state, frozen, tiny.tokens(CFG, 2, 9))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trained))
    assert not any(leaf.is_deleted() for leaf in [*jax.tree.leaves(model), key])
    assert again.data_position == {"next_index": 7}


def test_int8_weights_may_be_frozen_around_what_is_trained():
    model, tokens = quantise(tiny.model(CFG), "int8"), tiny.tokens(CFG, 2, 9)
    before = gj.loss(model, tokens)
    after, _, _ = run(model, optax.sgd(0.3), [tokens] * 4, norms)
    assert gj.loss(after, tokens) < before
    assert after.blocks[0][0].attn.q.w.get_value().matrix.codes.dtype == jnp.int8


def test_what_has_no_gradient_is_refused_by_name():
    model = quantise(tiny.model(CFG), "int8")
    with pytest.raises(ValueError, match=r"QuantizedWeight .*\.w has no gradient: .* `where`"):
        trainable(model)
    assert trainable(model, norms).trained


def test_a_choice_of_nothing_is_refused():
    with pytest.raises(
        ValueError, match=r"`where` chose none of the \d+ parameters, .* such as blocks\.0\.0"
    ):
        trainable(tiny.model(CFG), lambda path, param: "lora" in path)


def test_the_step_is_the_textbooks_bit_for_bit(as_for_users):
    model, batches = tiny.model(CFG), [tiny.tokens(CFG, 2, 9, seed=i) for i in range(3)]
    adam = optax.adam(1e-2)
    after, state, metrics = run(model, adam, batches)

    @jax.jit
    def step(model, moments, tokens):
        value, gradients = jax.value_and_grad(gj.loss)(model, tokens)
        updates, moments = adam.update(gradients, moments, model)
        return optax.apply_updates(model, updates), moments, value, optax.tree.norm(gradients)

    moments = adam.init(model)
    for tokens in batches:
        model, moments, value, norm = step(model, moments, tokens)
    jax.tree.map(np.testing.assert_array_equal, after, model)
    assert metrics["loss"] == value
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    assert state.step == len(batches)


def test_the_state_is_a_pytree_of_arrays():
    """What a checkpoint has to hold, and all of it: a run goes on as if nothing had happened."""
    model, tokens = tiny.model(CFG), tiny.tokens(CFG, 2, 9)
    trained, frozen, join = trainable(model, attention)
    init, step = make_step(next_token, optax.adam(1e-2), join)
    step = jax.jit(step)
    state, _ = step(init(trained, jax.random.key(5), data_position=3), frozen, tokens)
    stored, structure = jax.tree.flatten(state)
    assert all(isinstance(leaf, jax.Array) for leaf in stored)
    key = jax.random.key_data(state.key)
    again = jax.tree.unflatten(structure, [jnp.copy(leaf) for leaf in stored])
    assert isinstance(again, TrainState) and again.step == 1 and again.data_position == 3
    assert np.array_equal(jax.random.key_data(again.key), key)
    (one, _), (other, _) = (step(s, frozen, tokens) for s in (state, again))
    jax.tree.map(np.testing.assert_array_equal, one.trained, other.trained)


def test_metrics_are_the_steps_and_the_objectives():
    seen = []

    def objective(model, batch, key):
        value, metrics = next_token(model, batch, key)
        return value, metrics | {"draw": jax.random.uniform(key)}

    tokens = tiny.tokens(CFG, 2, 9)
    for steps in (1, 2, 2):
        _, _, metrics = run(tiny.model(CFG), optax.sgd(0.1), [tokens] * steps, objective=objective)
        own = {"loss", "grad_norm", "update_norm", "finite"}
        assert set(metrics) == own | {"tokens", "draw"}
        assert metrics["tokens"] == 16 and metrics["finite"]
        np.testing.assert_allclose(metrics["update_norm"], 0.1 * metrics["grad_norm"], rtol=1e-5)
        seen.append(float(metrics["draw"]))
    assert seen[0] != seen[1] == seen[2]  # of the seed and the step, and of nothing else


def test_next_token_counts_what_is_weighted():
    model, tokens = tiny.model(CFG), tiny.tokens(CFG, 2, 9)
    weights = np.zeros(tokens.shape, np.float32)
    weights[0, 3:5], weights[1, 0] = (0.5, 1), 1  # nothing comes before a first token
    value, metrics = next_token(model, TrainBatch(tokens, weights_BT=weights))
    np.testing.assert_allclose(value, gj.loss(model, tokens, weights_BT=weights), rtol=1e-6)
    assert metrics["tokens"] == 1.5
    targets = np.where(weights > 0, tokens, -1)
    value, metrics = next_token(model, TrainBatch(gj.Batch(tokens), targets), z_loss=0.1)
    expected = gj.loss(model, tokens, targets_BT=targets, z_loss=0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert metrics["tokens"] == 3


def test_elastic_is_the_mean_over_the_models_inside():
    model = tiny.model(CFG, "unrolled")
    layers, tokens = len(model.cfg.layers), tiny.tokens(model.cfg, 2, 9)
    half = Slice(ffn_widths=(24,) * layers)
    narrow = gj.Batch(tokens, ffn_widths_L=np.full(layers, 12))
    value, metrics = elastic(model, TrainBatch(narrow), submodels=(half,))
    losses = [gj.loss(model, tokens), gj.loss(at(model, half), tokens), gj.loss(model, narrow)]
    np.testing.assert_allclose(value, sum(losses) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["whole"], losses[0], rtol=1e-6)
    np.testing.assert_allclose(metrics["slice_0"], losses[1], rtol=1e-6)
    np.testing.assert_allclose(metrics["narrow"], losses[2], rtol=1e-6)
    value, metrics = elastic(model, tokens)
    np.testing.assert_allclose(value, losses[0], rtol=1e-6)
    assert set(metrics) == {"whole", "tokens"}


def test_objectives_take_their_options_by_partial():
    tokens = tiny.tokens(CFG, 2, 9)
    objective = partial(next_token, z_loss=0.5)
    *_, plain = run(tiny.model(CFG), optax.sgd(0.1), [tokens])
    *_, metrics = run(tiny.model(CFG), optax.sgd(0.1), [tokens], objective=objective)
    assert metrics["loss"] > plain["loss"]


def test_a_few_steps_of_muon_lower_the_loss():
    cfg = tiny.gemma1()
    model, tokens = tiny.model(cfg), tiny.tokens(cfg, 2, 12)
    before = gj.loss(model, tokens)
    after, *_ = run(model, muon(model, 0.02), [tokens] * 8)
    assert gj.loss(after, tokens) < 0.8 * before


def test_muon_takes_the_linear_maps_and_no_table_or_norm():
    model = tiny.model(tiny.gemma1())
    trained = trainable(model).trained
    state = muon(model, 0.02).init(trained)
    moments = state.inner_states["adam"].inner_state[0].mu
    adam = {path for path, leaf in moments.items() if isinstance(leaf, jnp.ndarray)}
    assert {name(p) for p in adam} == {
        name for name in map(name, trained) if "norm" in name or "table" in name
    }


def test_muon_of_a_part_has_moments_for_that_part_alone():
    model, tokens = tiny.model(CFG), tiny.tokens(CFG, 2, 9)
    after, state, _ = run(model, muon(model, 0.02), [tokens], attention)
    whole, _, _ = run(model, muon(model, 0.02), [tokens])
    parts = [trainable(m, attention).trained for m in (after, whole)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *parts)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (state.moments, state.trained)]
    assert sizes[0] < 2.5 * sizes[1]


def test_a_step_on_a_mesh_is_the_step_on_one_device():
    cfg = tiny.gemma1()  # layers alike: one is compiled
    model, tokens = tiny.model(cfg), tiny.tokens(cfg, 4, 12)
    mesh = make_mesh(cfg, jax.devices()[:4], fsdp=2, tensor=2)
    split = shard(model, mesh, TRAINING)
    (_, _, metrics), (_, state, sums) = (
        run(m, optax.adam(1e-2), [tokens] * 2) for m in (model, split)
    )
    np.testing.assert_allclose(sums["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(sums["grad_norm"], metrics["grad_norm"], rtol=1e-5)
    for path, moment in state.moments[0].mu.items():
        assert moment.sharding.is_equivalent_to(state.trained[path].sharding, moment.ndim)


def test_a_metric_by_the_name_of_the_steps_own_is_refused():
    def objective(model, batch, key):
        value, metrics = next_token(model, batch)
        return value, metrics | {"loss": value}

    with pytest.raises(ValueError, match=r"metrics \['loss'\] are the step's own; rename them"):
        model = tiny.model(CFG)
        run(model, optax.sgd(0.1), [tiny.tokens(CFG, 1, 5)], objective=objective)
