"""The gradient of attention compiled for real TPUs, with libtpu's compiler and no TPU."""

import jax
import jax.numpy as jnp
import pytest
from marks import nightly

from gemma_kernels.attention import AttentionSpec
from gemma_kernels.attention.tpu.backward import BackwardBlocks, attention_backward_tpu
from gemma_kernels.compilers.tpu_targets import CHIPS, lower

pytest.importorskip("libtpu", reason="the compiler comes with the plan extra: gemma-jax[plan]")

# name -> T, S, N, K, H, window, tiles (half of the default's: they compile faster)
SHAPES = {
    "1B, local": (1024, 1024, 4, 1, 256, 512, BackwardBlocks(256, 128, 256)),
    "4B, local": (2048, 2048, 8, 4, 256, 1024, BackwardBlocks(256, 128, 256)),
    "27B, local": (2048, 2048, 32, 16, 128, 1024, BackwardBlocks(256, 128, 256)),
    "4B, global": (2048, 2048, 8, 4, 256, None, None),
}
ALL = [
    *((target, "4B, local") for target in CHIPS),
    *(("v5e", name) for name in SHAPES if name != "4B, local"),
]
BY_DAY = [("v5e", "27B, local")]


@pytest.mark.parametrize(
    "target, name", [*BY_DAY, *nightly(*(pair for pair in ALL if pair not in BY_DAY))]
)
def test_compiles(target, name):
    T, S, N, K, H, window, blocks = SHAPES[name]
    spec = AttentionSpec(scale=H**-0.5, window=window, causal=True)
    q = jax.ShapeDtypeStruct((1, T, N, H), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, S, K, H), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((1, T, N), jnp.float32)

    def run(q, k, v, out, lse, dout):
        mask = (None, None, None)
        return attention_backward_tpu(q, k, v, out, lse, dout, None, *mask, spec, blocks=blocks)

    lowered = lower(run, target, q, k, k, q, lse, q)
    assert lowered.as_text().count("tpu_custom_call") == 1
    memory = lowered.compile().memory_analysis()
    # Operands and results in other layouts or padded, in float32 at most: no scores, and no sums
    # of parts, which would be as many times dq as there are blocks of keys.
    arrays = 4 * (3 * N * (T + 512) + 4 * K * (S + 1024)) * H
    assert memory.temp_size_in_bytes <= arrays
