"""Kernels compiled for real TPUs, with the compiler that comes with libtpu and no TPU."""

import jax
import jax.numpy as jnp
import pytest
from marks import nightly

from gemma_jax import Runtime, forward, preset
from gemma_jax.decoder.model import abstract_model
from gemma_kernels.attention import AttentionSpec, attention
from gemma_kernels.compilers.tpu_targets import CHIPS, lower

pytest.importorskip("libtpu", reason="the compiler comes with the plan extra: gemma-jax[plan]")

# name -> T, S, N, K, H, window
SHAPES = {
    "1B, local": (1024, 1024, 4, 1, 256, 512),
    "4B, local": (2048, 2048, 8, 4, 256, 1024),
    "27B, local": (2048, 2048, 32, 16, 128, 1024),
    "4B, global": (2048, 2048, 8, 4, 256, None),
    "4B, chunk on a long cache": (512, 4096, 8, 4, 256, None),
    "12B, local, odd length": (1021, 1500, 16, 8, 256, 1024),
    "Gemma 4 E2B, global": (1024, 8192, 8, 1, 512, None),
    "Gemma 4 E4B, global": (1024, 8192, 8, 2, 512, None),
    "SigLIP": (4096, 4096, 16, 16, 72, None),
}
BY_DAY = [("v5e", name) for name in ("4B, local", "4B, global", "SigLIP")]
ALL = [
    *((target, "4B, local") for target in CHIPS),
    *(("v5e", name) for name in SHAPES if name != "4B, local"),
    ("tpu7x", "4B, global"),
    *((target, "Gemma 4 E2B, global") for target in CHIPS if target != "v5e"),
    *((target, "Gemma 4 E4B, global") for target in CHIPS if target != "v5e"),
]


@pytest.mark.parametrize(
    "target, name", [*BY_DAY, *nightly(*(pair for pair in ALL if pair not in BY_DAY))]
)
def test_compiles(target, name):
    T, S, N, K, H, window = SHAPES[name]
    spec = AttentionSpec(scale=H**-0.5, window=window, masked=name != "SigLIP")
    q = jax.ShapeDtypeStruct((1, T, N, H), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, S, K, H), jnp.bfloat16)
    ints_T, ints_S = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (T, S))

    def run(q, k, v, lo, hi, pos):
        return attention(
            q, k, v, lo_BT=lo, hi_BT=hi, kv_pos_BS=pos, spec=spec, implementation="tpu"
        )

    lowered = lower(run, target, q, k, k, ints_T, ints_T, ints_S)
    assert "tpu_custom_call" in lowered.as_text()
    memory = lowered.compile().memory_analysis()
    # Operands and result in other layouts or padded, at most; no scores.
    padded = -(-H // 128) * 128
    operands = 2 * (2 * N * (T + 512) + 2 * K * (S + 1024)) * padded
    assert memory.temp_size_in_bytes <= 2 * operands


def test_models_run_on_it():
    """A model compiled for a TPU takes the kernels. Decoding: `test_tpu_decode_targets`."""
    runtime = Runtime(dtype=jnp.dtype("bfloat16"))
    model = abstract_model(preset("gemma3-1b"), runtime=runtime)

    def run(model, ids):
        return forward(model, ids, logits="last").logits

    text = lower(run, "v5e", model, jax.ShapeDtypeStruct((1, 2048), jnp.int32)).as_text()
    assert "local_attention" in text and "global_attention" in text
