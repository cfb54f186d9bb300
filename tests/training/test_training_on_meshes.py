"""Training on a mesh: states lie as their parameters do, and steps are those of one device."""

import jax
import numpy as np
import optax
import pytest
import tiny
from marks import nightly

import gemma_jax as gj
from gemma_jax.placement import shard
from gemma_jax.sharding import TRAINING, Partition, make_mesh
from gemma_jax.training.moments import placed_like
from gemma_jax.training.placing import batch_shardings, state_shardings

CFG = tiny.gemma3(layers=1)
MESHES = {
    "fsdp": {"fsdp": 8},
    "data and tensor": {"data": 2, "tensor": 4},
    "all three": {"data": 2, "fsdp": 2, "tensor": 2},
}
MOMENTUM = optax.sgd(0.1, momentum=0.9)


def full(model):
    return gj.trainable(model)


def lora(model):
    return gj.lora(model, gj.Lora(rank=2, dora=True), jax.random.key(1))


def cases():
    for name in MESHES:
        for choose in (full, lora):
            case = (name, choose)
            yield case if case == ("fsdp", full) else nightly(case)[0]


@pytest.mark.parametrize("mesh, choose", list(cases()))
def test_steps_are_those_of_one_device(mesh, choose):
    """Momentum after one step is the gradient, after two the sum of both."""
    model, tokens = tiny.model(CFG, attention_impl="reference"), tiny.tokens(CFG, 8, 12)
    placed = shard(model, make_mesh(CFG, **MESHES[mesh]), TRAINING)
    states = []
    for each in (model, placed):
        parts = choose(each)
        init, step = gj.make_step(gj.next_token, MOMENTUM, parts.join)
        state, batch = init(parts.trained, jax.random.key(0)), tokens
        if (partition := each.runtime.partition) is not None:
            state = jax.device_put(state, state_shardings(state, partition))
            batch = jax.device_put(tokens, batch_shardings(tokens, partition))
            assert batch.sharding.shard_shape(batch.shape) == (8 // rows_split(mesh), 12)
        where = jax.tree.map(lambda a: a.sharding, state)
        step = jax.jit(step, donate_argnums=0, out_shardings=(where, None))
        for _ in range(2):
            state, metrics = step(state, parts.frozen, batch)
        assert jax.tree.map(lambda a: a.sharding, state) == where
        states.append((state, metrics["loss"], metrics["grad_norm"]))
    (alone, loss, norm), (spread, *metrics) = states
    np.testing.assert_allclose(metrics, [loss, norm], rtol=1e-5)
    for path, array in alone.trained.items():
        trace, other = alone.moments[0].trace[path], spread.moments[0].trace[path]
        np.testing.assert_allclose(other, trace, rtol=1e-4, atol=1e-5 * np.abs(trace).max() + 1e-8)
        np.testing.assert_allclose(spread.trained[path], array, rtol=1e-5, atol=1e-6)
        assert other.sharding == spread.trained[path].sharding


def rows_split(mesh):
    return MESHES[mesh].get("data", 1) * MESHES[mesh].get("fsdp", 1)


@pytest.mark.nightly
def test_runs_on_a_mesh_end_as_runs_without():
    """With the optimizer that keeps most kinds of state, in micro-batches."""
    model, tokens = tiny.model(CFG, attention_impl="reference"), tiny.tokens(CFG, 8, 12)
    batch = gj.stack_micro_batches([tokens[:4], tokens[4:]])
    settings = gj.OptimizerSettings(name="adafactor", rate=1e-2, least_factored=4)
    placed = shard(model, make_mesh(CFG, jax.devices()[:4], fsdp=4), TRAINING)
    ends = []
    for each in (model, placed):
        optimizer = gj.make_optimizer(settings, each, steps=1)
        ends.append(gj.train(each, [batch], optimizer=optimizer, steps=1, micro_batches=2))
    assert ends[1].runtime.partition is not None
    for one, other in zip(*map(jax.tree.leaves, ends)):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


def test_moments_in_other_shapes_lie_as_their_parameters():
    """Muon's matrices hold the same entries; sums of rows and counts are whole on every device."""
    mesh = make_mesh(CFG, **MESHES["all three"])
    partition = Partition.of(mesh, TRAINING)
    heads = partition.sharding("NHD", (3, 4, 16, 32))
    trained = {("q",): jax.ShapeDtypeStruct((3, 4, 16, 32), np.float32, sharding=heads)}
    shapes = {"same": (3, 4, 16, 32), "matrices": (3, 64, 32), "rows": (3, 64), "one": (3, 1)}
    moments = {
        name: {("q",): jax.ShapeDtypeStruct(shape, np.float32)} for name, shape in shapes.items()
    }
    found = placed_like(moments, trained, partition.whole)
    parts = {n: leaf[("q",)].sharding.shard_shape(shapes[n]) for n, leaf in found.items()}
    assert parts == {
        "same": (3, 2, 16, 16),
        "matrices": (3, 32, 16),
        "rows": (3, 64),
        "one": (3, 1),
    }
