"""What a long prompt takes on real chips, planned by the compiler that comes with libtpu.

Gemma 3 4B reads 131,072 tokens in chunks: the program is that of one chunk, with the cache of the
whole length donated to it. No weights, no hardware.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemma_jax import Gemma, Runtime, Sampling, init_cache, preset
from gemma_jax.cache import LayerCache
from gemma_jax.passes import Pass
from gemma_jax.quant import store_weights
from gemma_jax.session import State, advance
from gemma_jax.sharding import letter_sharding
from gemma_kernels.targets import CHIPS, one_device

pytest.importorskip("libtpu", reason="the compiler comes with the plan extra: gemma-jax[plan]")

LENGTH, CHUNK = 131_072, 1024


def is_param(node) -> bool:
    return isinstance(node, nnx.Param)


def abstract_model(cfg, int8: bool, **runtime) -> Gemma:
    """Matrices of the decoder in int8 if asked for, everything else in bfloat16."""
    store = store_weights("int8")

    def make():
        model = Gemma(
            cfg, rngs=nnx.Rngs(0), runtime=Runtime(dtype=jnp.dtype("bfloat16"), **runtime)
        )

        def narrow(path, param):
            array = param.get_value().astype(jnp.bfloat16)
            in_tower = "vision" in jax.tree_util.keystr(path)
            return param.replace(store(param, array) if int8 and not in_tower else array)

        return jax.tree_util.tree_map_with_path(narrow, model, is_leaf=is_param)

    return jax.eval_shape(make)


def planned(model: Gemma, mesh: Mesh):
    """Memory of one chunk's program, per device, in bytes."""
    cfg, whole = model.cfg, NamedSharding(mesh, PartitionSpec())

    def placed(tree, dims: str | None = None):
        def place(a):
            sharding = whole if dims is None else letter_sharding(mesh, dims, a.shape)
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

        return jax.tree.map(place, tree)

    def of_param(param: nnx.Param) -> nnx.Param:
        value = param.get_value()
        return param.replace(placed(value, param.dims if hasattr(value, "shape") else None))

    model = jax.tree.map(of_param, model, is_leaf=is_param)
    cache = jax.eval_shape(lambda: init_cache(cfg, model.segments, 1, LENGTH, model.runtime.dtype))
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    state = State(
        cache=jax.tree.map(
            lambda node: placed(node, "BKSH" if isinstance(node, LayerCache) else None),
            cache,
            is_leaf=lambda node: isinstance(node, LayerCache),
        ),
        **placed(
            dict(
                last_B=ints(1),
                keys_B=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1)),
                done_B=jax.ShapeDtypeStruct((1,), bool),
                step=ints(),
                tokens_BX=ints(1, 16),
                log_probs_BX=jax.ShapeDtypeStruct((1, 16), jnp.float32),
            )
        ),
        seen_BV=None,
    )
    ends_B = jax.ShapeDtypeStruct((1,), bool)
    prompt = placed(Pass(ints(1, CHUNK), ints(1, CHUNK), None, ends_B))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        how = placed(jax.tree.map(jnp.asarray, Sampling().program()))
        lowered = advance.lower(
            model, state, how, placed(ints()), prompt, stop_ids=(1,), loop=False
        )
    return lowered.compile().memory_analysis()


def mesh_of(count: int) -> Mesh:
    one_device("v5e")  # makes the compiler ready
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS["v5e"].topology)
    devices = np.array(topology.devices[:count]).reshape(1, count)
    return Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def size(tree, chips: int = 1) -> int:
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree)) // chips


@pytest.mark.parametrize("chips, int8", [(1, True), (4, False)], ids=["int8", "four chips"])
def test_131072_tokens_fit(chips, int8):
    """Weights, cache and all that a chunk needs besides, on each chip; the tower stays loaded."""
    cfg = preset("gemma3-4b")
    model = abstract_model(cfg, int8, attention_impl="auto" if chips == 1 else "xla")
    cache = jax.eval_shape(lambda: init_cache(cfg, model.segments, 1, LENGTH, jnp.bfloat16))
    memory = planned(model, mesh_of(chips))
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new
    assert used + size(model.vision, chips) < CHIPS["v5e"].memory
    # The cache is written where it lies, and no weight is stored a second time.
    assert memory.alias_size_in_bytes >= size(cache, chips)
    assert memory.temp_size_in_bytes < size(cache, chips) / 2
