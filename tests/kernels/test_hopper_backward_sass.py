"""Gradients of attention on Hopper compiled to machine code with no GPU: nothing spilled."""

import jax
import jax.numpy as jnp
import pytest

from gemma_kernels.attention import AttentionSpec
from gemma_kernels.attention.hopper.backward import attention_backward_hopper
from gemma_kernels.compilers import hopper_sass as sass
from gemma_kernels.mosaic_gpu import SMEM_LIMIT

if reason := sass.missing():
    pytest.skip(reason, allow_module_level=True)


@pytest.mark.parametrize(
    "H, soft_cap, dtype",
    [
        (64, None, jnp.bfloat16),
        (128, None, jnp.bfloat16),
        (256, None, jnp.bfloat16),
        (256, 50.0, jnp.float16),
    ],
)
def test_gates(H, soft_cap, dtype):
    T, N, K = 2048, 8, 4
    spec = AttentionSpec(scale=H**-0.5, soft_cap=soft_cap)
    q, k = (jax.ShapeDtypeStruct((1, T, heads, H), dtype) for heads in (N, K))
    row, lse = jax.ShapeDtypeStruct((1, T), jnp.int32), jax.ShapeDtypeStruct((1, T, N), jnp.float32)

    def run(*arrays):
        return attention_backward_hopper(*arrays, spec)

    arrays = (q, k, k, q, lse, q, lse, row, row, row)
    _, kernels = sass.compile_for_hopper(run, *arrays)
    # Steps of 16 along the sums of width 256 (S and dP) and of 64 (the gradients), at the least.
    least = {"attention_hopper_dkv": 2 * (H // 16 + 4), "attention_hopper_dq": 2 * (H // 16) + 4}
    assert {kernel.name for kernel in kernels} == set(least)
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared is None or kernel.shared <= SMEM_LIMIT
        assert kernel.products >= least[kernel.name]
        if kernel.instructions is not None:
            assert kernel.instructions["HGMMA"] >= least[kernel.name]
            assert kernel.instructions["UTMALDG"] > 0
