"""Attention on TPU: the public entry of the Pallas kernels, for training and prefill.

The forward kernels are in `tpu_forward.py`.
"""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.attention.tpu import blocks as tpu_blocks
from gemma_kernels.attention.tpu.backward import attention_backward_tpu
from gemma_kernels.attention.tpu.forward import (
    LANES,
    VMEM_LIMIT,
    Blocks,
    attention_forward_tpu,
    make_plan,
)

__all__ = ["Blocks", "attention_tpu", "default_blocks"]


def attention_tpu(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    lo_BT: jax.Array | None,
    hi_BT: jax.Array | None,
    kv_pos_BS: jax.Array | None,
    spec: AttentionSpec,
    *,
    return_lse: bool = False,
    blocks: Blocks | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Same results as `reference.attention_reference`, with gradients.

    Args:
      lo_BT, hi_BT, kv_pos_BS: The mask; `None` where the spec states it.
      return_lse: Return `lse_BTN` as well.
      blocks: Sizes of tiles; default: by chip and shape.
      interpret: Run without a TPU, by Pallas' interpreter.

    Raises:
      NotImplementedError: A call that these kernels do not serve; says why.
      ValueError: Sizes of tiles that do not fit.
    """
    if not spec.softmax_in_float32:
        raise NotImplementedError("its softmax is in float32 only")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"queries are {q_BTNH.dtype}; it takes bfloat16 and float32")
    blocks = blocks or default_blocks(q_BTNH.shape, k_BSKH.shape, spec, q_BTNH.dtype)
    _check_blocks(blocks, q_BTNH, k_BSKH, spec)
    if not spec.masked:
        lo_BT = hi_BT = kv_pos_BS = None
    out_BTNH, lse_BTN = _attention(
        q_BTNH, k_BSKH.astype(q_BTNH.dtype), v_BSKH.astype(q_BTNH.dtype),
        lo_BT, hi_BT, kv_pos_BS, spec, blocks, return_lse, interpret,
    )  # fmt: skip
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH


def default_blocks(
    q_shape: tuple, k_shape: tuple, spec: AttentionSpec, dtype=jnp.bfloat16
) -> Blocks:
    """The table's tiles for the chip that the program is for, made smaller until they fit."""
    T, N, H = q_shape[1:]
    S, K = k_shape[1:3]
    row = tpu_blocks.nearest("forward", tpu_blocks.this_chip(), N // K, H, spec.window)
    best = Blocks(**row["blocks"])
    q, k = min(_up(T), best.q), min(_up(S), best.k)
    piece = max(LANES, best.piece * row["groups"] * K // N // LANES * LANES)  # as many rows
    fetch = max(1, min(_up(S) // k, best.fetch))
    blocks = Blocks(q=q, k=k, piece=math.gcd(q, piece), fetch=fetch)
    q_BTNH, k_BSKH = (jax.ShapeDtypeStruct(shape, dtype) for shape in (q_shape, k_shape))

    def needed(blocks: Blocks) -> int:
        return make_plan(q_BTNH, k_BSKH, spec.causal, spec, blocks).vmem_bytes

    # With wider heads than 256 the compiler's own copies grow beyond what its limit leaves.
    room = VMEM_LIMIT if H <= 256 else VMEM_LIMIT * 3 // 4
    while needed(blocks) > room and (smaller := _smaller(blocks)) != blocks:
        blocks = smaller
    if needed(blocks) > VMEM_LIMIT:
        raise NotImplementedError(f"heads of {H} do not fit VMEM by any tiles")
    return blocks


def _smaller(blocks: Blocks) -> Blocks:
    """The next smaller tiles: first fewer blocks at once, then narrower ones."""
    if blocks.fetch > 1:
        return replace(blocks, fetch=blocks.fetch // 2)
    if blocks.k > LANES:
        return replace(blocks, k=_up(blocks.k // 2))
    if blocks.piece > LANES:
        return replace(blocks, piece=math.gcd(blocks.q, _up(blocks.piece // 2)))
    return replace(blocks, q=max(blocks.piece, blocks.q // 2 // LANES * LANES))


def _up(size: int) -> int:
    return pl.cdiv(size, LANES) * LANES


def _check_blocks(blocks: Blocks, q_BTNH, k_BSKH, spec: AttentionSpec) -> None:
    for name in ("q", "k", "piece"):
        size = getattr(blocks, name)
        if size < LANES or size % LANES:
            raise ValueError(f"tiles must be multiples of {LANES}, got {name}={size}")
    if blocks.q % blocks.piece:
        raise ValueError(f"piece={blocks.piece} must divide q={blocks.q}")
    if blocks.fetch < 1:
        raise ValueError(f"fetch={blocks.fetch} must be at least 1")
    needed = make_plan(q_BTNH, k_BSKH, spec.causal, spec, blocks).vmem_bytes
    if needed > VMEM_LIMIT:
        raise ValueError(
            f"{blocks} with heads of {q_BTNH.shape[3]} needs {needed / 2**20:.0f} MiB of VMEM; "
            f"there are {VMEM_LIMIT / 2**20:.0f}: choose smaller tiles"
        )


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attention(q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS, spec, blocks, with_lse, interpret):
    operands = (q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS)
    return attention_forward_tpu(
        *operands, spec, blocks=blocks, with_lse=with_lse, interpret=interpret
    )


def _attention_fwd(
    q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS, spec, blocks, with_lse, interpret
):
    operands = (q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS)
    out_BTNH, lse_BTN = attention_forward_tpu(
        *operands, spec, blocks=blocks, with_lse=True, interpret=interpret
    )
    return (out_BTNH, lse_BTN if with_lse else None), (*operands, out_BTNH, lse_BTN)


def _attention_bwd(spec, blocks, with_lse, interpret, residuals, cotangents):
    del blocks, with_lse  # of the forward pass; without one, its cotangent is `None`
    q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS, out_BTNH, lse_BTN = residuals
    gradients = attention_backward_tpu(
        q_BTNH, k_BSKH, v_BSKH, out_BTNH, lse_BTN, *cotangents, lo_BT, hi_BT, kv_pos_BS, spec,
        interpret=interpret,
    )  # fmt: skip
    return *gradients, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)
