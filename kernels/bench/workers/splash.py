"""Splash attention of JAX and of tokamax, as jobs for the TPU compiler.

One key/value head and one query head: their grids run heads one after the other, all alike.
"""

import dataclasses

import jax
import jax.numpy as jnp


def operands(length: int, H: int, dtype=jnp.bfloat16) -> tuple:
    return (jax.ShapeDtypeStruct((1, length, H), dtype),) * 3


def gradient(kernel):
    """dq, dk, dv for a cotangent; the forward pass, which has a kernel of its own, comes along."""
    return lambda q, k, v: jax.vjp(kernel, q, k, v)[1](q)


def jax_splash(
    length: int, H: int, window: int | None, q: int, k: int, backward: bool = False, layout: int = 1
):
    """`layout` of the keys: 1 rows of a key, 2 rows of a channel."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    backward_blocks = dict(
        block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=k, block_q_dq=q, block_kv_dq=k
    )
    sizes = kernels.BlockSizes(
        block_q=q,
        block_kv=k,
        block_kv_compute=k,
        k_layout=kernels.QKVLayout(layout),
        **(backward_blocks if backward else {}),
    )
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
    return gradient(kernel) if backward else kernel, operands(length, H)


def tokamax_splash(
    length: int,
    H: int,
    window: int | None,
    q: int,
    k: int,
    inner: int | None = None,
    backward: bool = False,
    scheduler: bool = False,
):
    """`inner` keys at a time within a block of `k`; `scheduler`: its experimental scheduler."""
    from tokamax._src.ops.experimental.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    backward_blocks = dict(block_q_dkv=q, block_kv_dkv=k, block_kv_dkv_compute=inner or k)
    config = dataclasses.replace(
        kernels.SplashConfig.get_default(),
        block_q=q,
        block_kv=k,
        block_kv_compute=inner or k,
        use_experimental_scheduler=scheduler,
        use_base2_exp=True,
        **(backward_blocks if backward else {}),
    )
    kernel = kernels.make_splash_mha(
        mask,
        config=config,
        save_residuals=False,
        mask_value=float(jnp.finfo(jnp.float32).min),
        q_seq_shards=1,
        downcast_smem_data=False,
    )
    return gradient(kernel) if backward else kernel, operands(length, H)
