"""Rows of tables as they are read on TPUs: the same rows, and no table in another order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.weights import gather as module
from gemma_jax.weights.gather import lookup

TABLES = [
    ((96, 5, 16), jnp.int8),
    ((128, 5, 16), jnp.int4),
    ((128, 5, 16), jnp.uint4),
    ((96, 5, 16), jnp.int4),  # nor of those of 4 bits
    ((96, 5, 16), jnp.bfloat16),
    ((96, 5, 16), jnp.float32),
    ((90, 5, 16), jnp.int8),  # no whole number of tiles
    ((96, 16), jnp.int8),
    ((90, 16), jnp.bfloat16),
]


@pytest.mark.parametrize("shape, dtype", TABLES)
@pytest.mark.parametrize("ids", [(1, 1), (3, 1), (1, 7)], ids=str)
def test_the_same_rows(shape, dtype, ids, monkeypatch):
    monkeypatch.setattr(module, "target_platform", lambda: "tpu")
    random = np.random.default_rng(0)
    table = jnp.asarray(random.integers(-120, 120, shape).astype(dtype))
    index = jnp.asarray(random.integers(0, shape[0], ids), jnp.int32)
    rows = jax.jit(lookup)(table, index)
    assert rows.dtype == dtype and (rows == table[index]).all()
    edges = jnp.array([[0, shape[0] - 1]])
    assert (lookup(table, edges) == table[edges]).all()


def test_gradients(monkeypatch):
    monkeypatch.setattr(module, "target_platform", lambda: "tpu")
    random = np.random.default_rng(0)
    table = jnp.asarray(random.normal(size=(64, 3, 8)), jnp.float32)
    index = jnp.array([[5, 5, 60]])
    weight = jnp.asarray(random.normal(size=(1, 3, 3, 8)), jnp.float32)
    ours = jax.grad(lambda t: jnp.sum(lookup(t, index) * weight))(table)
    plain = jax.grad(lambda t: jnp.sum(t[index] * weight))(table)
    np.testing.assert_allclose(ours, plain, atol=1e-6)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rows", [1, 8, 512])
@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
def test_no_table_in_another_order(dtype, rows, devices):
    """Of Gemma 3n's per-layer embeddings, and of a vocabulary that is no multiple of 32 x 8."""
    pytest.importorskip("libtpu", reason="pip install 'gemma-jax[plan]'")
    from jax.sharding import NamedSharding, PartitionSpec

    from gemma_jax.planning import find_topology

    mesh = jax.sharding.Mesh(
        find_topology("v5e:2x4").devices[:devices],
        ("tensor",),
        axis_types=(jax.sharding.AxisType.Auto,),
    )
    split = NamedSharding(mesh, PartitionSpec("tensor"))
    tables = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=split)
        for shape in ((262_144, 30, 256), (262_208, 1024))
    ]
    index = jax.ShapeDtypeStruct(
        (rows, 1), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(lambda tables, index: [lookup(t, index) for t in tables])
        compiled = program.lower(tables, index).compile()
    # What is read of the tiles, and no table.
    tiles = rows * 30 * 256 * 32
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * tiles + 1e6
