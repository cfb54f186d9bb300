"""Attention on Hopper (H100, H200) for training and prefill: Mosaic GPU kernels, both ways.

`hopper_forward` and `hopper_backward` hold the kernels; here are what they serve and the gradient.
"""

from functools import partial

import jax
import jax.numpy as jnp

from gemma_kernels.attention.hopper.backward import attention_backward_hopper
from gemma_kernels.attention.hopper.forward import (
    Blocks,
    check_blocks,
    default_blocks,
    forward,
    padded_width,
)
from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.mosaic_gpu import interpreter, joins_batch

WIDEST = 256


def attention_hopper(
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
    interpret: bool | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Same result as `reference.attention_reference`, `[B, T, N, H]` in the queries' dtype.

    Args:
      q_BTNH, k_BSKH, v_BSKH: bfloat16 or float16; keys and values are cast to the queries' dtype.
      lo_BT, hi_BT, kv_pos_BS: The mask; not looked at, and may be `None`, if `spec` says that it is
        causal or that there is none.
      return_lse: Return float32 `[B, T, N]` as well, the logarithm of the softmax's denominator;
        -inf for queries that see nothing. Gradients flow through it, too.
      blocks: Sizes of tiles of the forward pass; default: by head width.
      interpret: Run on a CPU, by the interpreter of Mosaic GPU.

    Raises:
      NotImplementedError: A call that these kernels do not serve; says why.
      ValueError: Sizes of tiles that do not fit.
    """
    _check(q_BTNH, k_BSKH, spec)
    if spec.causal or not spec.masked:
        lo_BT = hi_BT = kv_pos_BS = None
    width = padded_width(q_BTNH.shape[3])
    blocks = blocks or default_blocks(width)
    check_blocks(blocks, width)
    k_BSKH, v_BSKH = (x.astype(q_BTNH.dtype) for x in (k_BSKH, v_BSKH))
    operands = (q_BTNH, k_BSKH, v_BSKH, lo_BT, hi_BT, kv_pos_BS)
    out_BTNH, lse_BTN = _attention(*operands, spec, blocks, return_lse, bool(interpret))
    return (out_BTNH, lse_BTN) if return_lse else out_BTNH


def _check(q_BTNH: jax.Array, k_BSKH: jax.Array, spec: AttentionSpec) -> None:
    if not spec.softmax_in_float32:
        raise NotImplementedError("its softmax is in float32 only")
    if q_BTNH.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"queries are {q_BTNH.dtype}; Hopper's tensor cores take bfloat16 and float16 in full, "
            "and would round float32 to 10 bits"
        )
    if q_BTNH.shape[3] > WIDEST:
        raise NotImplementedError(
            f"heads are {q_BTNH.shape[3]} wide; registers hold a sum of {WIDEST} columns"
        )
    if not q_BTNH.size or not k_BSKH.size:
        raise NotImplementedError("it needs at least one query and one key")


@partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def _attention(q, k, v, lo, hi, pos, spec, blocks, return_lse, interpret):
    run = partial(forward, spec=spec, blocks=blocks, return_lse=return_lse, interpret=interpret)
    return joins_batch(run)(q, k, v, lo, hi, pos)


def _attention_fwd(q, k, v, lo, hi, pos, spec, blocks, return_lse, interpret):
    out, lse = _attention(q, k, v, lo, hi, pos, spec, blocks, True, interpret)
    return (out, lse if return_lse else None), (q, k, v, out, lse, lo, hi, pos)


def _attention_bwd(spec, blocks, return_lse, interpret, residuals, gradients):
    del blocks, return_lse  # of the forward pass
    q, k, v, out, lse, lo, hi, pos = residuals
    run = partial(
        attention_backward_hopper, spec=spec, interpret=interpreter() if interpret else None
    )
    dq, dk, dv = joins_batch(run)(q, k, v, out, lse, *gradients, lo, hi, pos)
    return dq, dk, dv, None, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)
