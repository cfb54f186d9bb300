"""Kernels for Hopper compiled to machine code with no GPU: nothing spilled, tensor cores used."""

import jax
import jax.numpy as jnp
import pytest

from gemma_kernels.attention import AttentionSpec
from gemma_kernels.attention.hopper.attention import attention_hopper
from gemma_kernels.compilers import hopper_sass as sass
from gemma_kernels.decode_attention.hopper import decode_attention_hopper
from gemma_kernels.mosaic_gpu import SMEM_LIMIT

if reason := sass.missing():
    pytest.skip(reason, allow_module_level=True)


def array(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def ints(*shape):
    return array(*shape, dtype=jnp.int32)


def check(function, *args, products: int):
    """One kernel, with at least `products` wgmma instructions."""
    _, (kernel,) = sass.compile_for_hopper(function, *args)
    assert kernel.spilled == 0
    assert kernel.shared is None or kernel.shared <= SMEM_LIMIT
    assert kernel.products >= products
    if kernel.instructions is not None:
        assert kernel.instructions["HGMMA"] >= products
        assert kernel.instructions["UTMALDG"] > 0


# name -> T, S, H, mask, spec's arguments
FORWARD = {
    "causal, 256": (2048, 2048, 256, False, dict(causal=True)),
    "causal window, 128": (1024, 4096, 128, False, dict(causal=True, window=1024)),
    "intervals, 256": (2048, 2048, 256, True, {}),
    "intervals and soft cap, 128": (2048, 2048, 128, True, dict(soft_cap=50.0)),
    "intervals, 64, ragged": (1021, 1500, 64, True, {}),
    "SigLIP": (4096, 4096, 72, False, dict(masked=False)),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    T, S, H, masked, facts = FORWARD[name]
    spec = AttentionSpec(scale=H**-0.5, **facts)
    mask = (ints(2, T), ints(2, T), ints(2, S)) if masked else (None, None, None)

    def run(q, k, v, *mask):
        return attention_hopper(q, k, v, *mask, spec, return_lse=True)

    keys = array(2, S, 4, H)
    check(run, array(2, T, 8, H), keys, keys, *mask, products=16)


@pytest.mark.parametrize("H", [64, 128, 256])
def test_decoding(H):
    spec = AttentionSpec(scale=H**-0.5)

    def run(q, k, v, lo, hi, pos):
        return decode_attention_hopper(q, k, v, lo_BT=lo, hi_BT=hi, kv_pos_BS=pos, spec=spec)

    cache = array(1, 4, 32768, H)
    check(run, array(1, 1, 8, H), cache, cache, ints(1, 1), ints(1, 1), ints(1, 32768), products=8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_a_layer_of_a_stack_is_not_copied(dtype):
    """A step reads eight layers in turn, and needs no room for one."""
    cache = array(8, 1, 1, 32768, 256, dtype=dtype)
    scales = [array(8, 1, 1, 32768, dtype=jnp.float32)] * 2 if dtype == jnp.int8 else []

    def run(q, k, v, lo, hi, pos, *scales):
        options = dict(zip(("k_scale_BKS", "v_scale_BKS"), scales))
        options |= dict(lo_BT=lo, hi_BT=hi, kv_pos_BS=pos, spec=AttentionSpec(scale=0.1))

        def layer(i, q):
            return decode_attention_hopper(q, k, v, **options, layer=i)

        return jax.lax.fori_loop(0, 8, layer, q)

    rows = (ints(1, 1), ints(1, 1), ints(1, 32768))
    arrays = (array(1, 1, 4, 256), cache, cache, *rows, *scales)
    compiled, (kernel,) = sass.compile_for_hopper(run, *arrays)
    assert kernel.spilled == 0
    one_layer = 32768 * 256 * cache.dtype.itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < one_layer // 2


@pytest.mark.parametrize("H", [128, 256])
def test_decoding_from_int8(H):
    spec = AttentionSpec(scale=0.1)

    def run(q, k, v, lo, hi, pos, k_scale, v_scale):
        scales = dict(k_scale_BKS=k_scale, v_scale_BKS=v_scale)
        return decode_attention_hopper(
            q, k, v, lo_BT=lo, hi_BT=hi, kv_pos_BS=pos, spec=spec, **scales
        )

    cache, scales = array(8, 2, 1024, H, dtype=jnp.int8), array(8, 2, 1024, dtype=jnp.float32)
    rows = (ints(8, 4), ints(8, 4), ints(8, 1024))
    check(run, array(8, 4, 8, H), cache, cache, *rows, scales, scales, products=8)
