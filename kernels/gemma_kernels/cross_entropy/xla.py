"""Cross-entropy in plain XLA, for any backend: the vocabulary in chunks, logits never whole.

    forward     for each chunk of the table   logits [B, T, chunk]  ->  running max, sum of exp,
                                              and the label's logit where the chunk has it
    backward    for each chunk of the table   the same logits again, from them dlogits;
                                              dx [B, T, D] += dlogits @ chunk
                                              dtable [chunk, D] = dlogits^T @ x, written once

Of a frozen table, as under adapters, only dx is asked for, and no logits are computed twice: dx is
linear in the two cotangents of a token. The forward pass sums up the one's factor, the mean row
`softmax @ table`, as flash attention sums up values; the other's is the label's own row.

Chunks are cut from the vocabulary and not from the tokens because a chunk's part of the table's
gradient is then complete after one product: it goes straight to its place in the dtype of the
table, and no float32 copy of `[V, D]` is summed up. What is read and written with every chunk is
`dx` in float32, which is smaller than the table as long as there are fewer than V tokens.

Memory beside operands and results, for `[8, 8192]` tokens of width 2,560: one tile of logits (256
MB) in float32, the same in the dtype of the activations, and in the backward pass `dx` in float32
(671 MB). All logits would take 69 GB. Of a float32 table under bfloat16 activations, XLA's TPU
compiler keeps a copy in bfloat16 beside.

Every chunk takes its rows from `_groups(V)` equal parts of the table, so that a table whose
vocabulary is split over up to so many devices is read by each of them where it lies.

Local letters: G parts of the table; R rows of a chunk in each part.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from gemma_kernels.platform import target_platform
from gemma_kernels.quantized_matmul.form import ROWS as TILE_ROWS
from gemma_kernels.quantized_matmul.form import QuantizedMatrix

MOST_GROUPS = 16
ROWS = 16  # of a tile in a TPU's memory, for dtypes of two bytes
TILE_BYTES = 256 << 20  # of logits that exist at one time, or of a chunk of the table
CPU_TILE_BYTES = 2 << 20  # there they should stay in the cache
SMALLEST_CHUNK = 1024


def default_chunk(tokens: int, width: int, vocab: int) -> int:
    """Rows of the table per step: as many as fill a tile, by themselves or by their logits."""
    tile = CPU_TILE_BYTES if target_platform() == "cpu" else TILE_BYTES
    return min(max(tile // (4 * max(tokens, width)), SMALLEST_CHUNK), vocab)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def statistics_xla(
    x_BTD: jax.Array,
    table_VD: jax.Array | QuantizedMatrix,
    labels_BT: jax.Array,
    soft_cap: float | None,
    chunk: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Same result as `reference.statistics_reference`."""
    return _forward(x_BTD, table_VD, labels_BT, soft_cap, chunk)[0]


def _forward(x_BTD, table_VD, labels_BT, soft_cap, chunk, with_mean: bool = False):
    """The statistics; if asked for also the mean row, weighted by the slope of the log-sum-exp."""
    exact = _exact(x_BTD.dtype)

    def step(carry, first, size):
        top_BT, total_BT, chosen_BT, mean_BTD = carry
        rows_GRD = _rows(table_VD, first, size, x_BTD.dtype)
        logits_BTGR = _logits(x_BTD, rows_GRD, soft_cap)
        new_BT = jnp.maximum(top_BT, jnp.max(logits_BTGR, axis=(2, 3)))
        exp_BTGR = jnp.exp(logits_BTGR - new_BT[..., None, None])
        kept_BT = jnp.exp(top_BT - new_BT)
        total_BT = total_BT * kept_BT + jnp.sum(exp_BTGR, axis=(2, 3))
        own_BTGR = _is_label(labels_BT, table_VD.shape[0], first, size)
        chosen_BT += jnp.sum(jnp.where(own_BTGR, logits_BTGR, 0), axis=(2, 3))
        if with_mean:
            p_BTGR = (exp_BTGR * _cap_slope(logits_BTGR, soft_cap)).astype(x_BTD.dtype)
            mean_BTD *= kept_BT[..., None]
            mean_BTD += jnp.einsum("BTGR,GRD->BTD", p_BTGR, rows_GRD, **exact)
        return new_BT, total_BT, chosen_BT, mean_BTD

    zeros_BT = jnp.zeros(labels_BT.shape, jnp.float32)
    mean_BTD = jnp.zeros(x_BTD.shape, jnp.float32) if with_mean else None
    carry = (jnp.full_like(zeros_BT, -jnp.inf), zeros_BT, zeros_BT, mean_BTD)
    top_BT, total_BT, chosen_BT, mean_BTD = _each_chunk(step, carry, x_BTD, table_VD, chunk)
    if with_mean:
        mean_BTD /= total_BT[..., None]
    return (top_BT + jnp.log(total_BT), chosen_BT, top_BT), mean_BTD


def _saving_forward(x_BTD, table_VD, labels_BT, soft_cap, chunk):
    """The same with what the backward pass needs: the rows' mean if the table is frozen."""
    primals = (x_BTD, table_VD, labels_BT)
    learns = any(leaf.perturbed for leaf in jax.tree.leaves(table_VD, is_leaf=_is_primal))
    frozen = not learns or isinstance(table_VD, QuantizedMatrix)
    primals = jax.tree.map(lambda leaf: leaf.value, primals, is_leaf=_is_primal)
    out, mean_BTD = _forward(*primals, soft_cap, chunk, with_mean=frozen)
    return out, (primals, out, mean_BTD)


def _is_primal(node) -> bool:
    return isinstance(node, CustomVJPPrimal)


def _backward(soft_cap, chunk, saved, cotangents):
    (x_BTD, table_VD, labels_BT), (lse_BT, chosen_BT, _), mean_BTD = saved
    dlse_BT, dchosen_BT = (
        jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d for d in cotangents[:2]
    )  # nothing is learned from the largest logit
    if mean_BTD is not None:
        dchosen_BT *= _cap_slope(chosen_BT, soft_cap)
        dx_BTD = dlse_BT[..., None] * mean_BTD
        dx_BTD += dchosen_BT[..., None] * _label_rows(table_VD, labels_BT, x_BTD.dtype)
        return dx_BTD.astype(x_BTD.dtype), None, None
    exact = _exact(x_BTD.dtype)

    def step(carry, first, size):
        dx_BTD, dtable_GVD = carry
        rows_GRD = _rows(table_VD, first, size, x_BTD.dtype)
        logits_BTGR = _logits(x_BTD, rows_GRD, soft_cap)
        p_BTGR = jnp.exp(logits_BTGR - lse_BT[..., None, None])
        own_BTGR = _is_label(labels_BT, table_VD.shape[0], first, size)
        d_BTGR = dlse_BT[..., None, None] * p_BTGR
        d_BTGR += jnp.where(own_BTGR, dchosen_BT[..., None, None], 0)
        d_BTGR = (d_BTGR * _cap_slope(logits_BTGR, soft_cap)).astype(x_BTD.dtype)
        dx_BTD += jnp.einsum("BTGR,GRD->BTD", d_BTGR, rows_GRD, **exact)
        drows_GRD = jnp.einsum("BTGR,BTD->GRD", d_BTGR, x_BTD, **exact).astype(table_VD.dtype)
        dtable_GVD = lax.dynamic_update_slice_in_dim(dtable_GVD, drows_GRD, first, axis=1)
        return dx_BTD, dtable_GVD

    carry = (jnp.zeros(x_BTD.shape, jnp.float32), jnp.zeros_like(_grouped(table_VD)))
    dx_BTD, dtable_GVD = _each_chunk(step, carry, x_BTD, table_VD, chunk)
    return dx_BTD.astype(x_BTD.dtype), dtable_GVD.reshape(table_VD.shape), None


statistics_xla.defvjp(_saving_forward, _backward, symbolic_zeros=True)


def _each_chunk(step: Callable, carry, x_BTD, table_VD, chunk: int | None):
    """`carry = step(carry, first, size)` over all rows of every group.

    What the chunks leave over comes first: after the loop, XLA's CPU backend would copy the carry.
    """
    (V, D), (B, T) = table_VD.shape, x_BTD.shape[:2]
    size = max((chunk or default_chunk(B * T, D, V)) // _groups(V), 1)
    if isinstance(table_VD, QuantizedMatrix) and table_VD.tiled:
        size = max(size // TILE_ROWS, 1) * TILE_ROWS
    steps, rest = divmod(V // _groups(V), size)
    if rest:
        carry = step(carry, steps * size, rest)
    if steps == 1:
        carry = step(carry, 0, size)
    elif steps:
        firsts = size * jnp.arange(steps)
        carry, _ = lax.scan(lambda carry, i: (step(carry, i, size), None), carry, firsts)
    return carry


def _groups(V: int) -> int:
    """Parts of the vocabulary that every chunk has rows of: a power of two, whole tiles each."""
    return math.gcd(V // ROWS, MOST_GROUPS) if V % ROWS == 0 else 1


def _grouped(array_V: jax.Array, V: int | None = None) -> jax.Array:
    """An array of rows, or of tiles of them, in the groups of `V` rows."""
    G = _groups(V or len(array_V))
    return array_V.reshape(G, len(array_V) // G, *array_V.shape[1:])


def _rows(table_VD, first, size, dtype):
    """`size` rows of every group, `[G, R, D]` in `dtype`."""
    cut = partial(lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=1)
    if isinstance(table_VD, QuantizedMatrix):
        return _widened_rows(table_VD, first, size).astype(dtype)
    if table_VD.dtype == jnp.bfloat16 and dtype != jnp.bfloat16:
        # Cut as bits: XLA's CPU backend would else widen the whole table, and keep it beside.
        bits_VD = lax.bitcast_convert_type(table_VD, jnp.uint16)
        return lax.bitcast_convert_type(cut(_grouped(bits_VD)), jnp.bfloat16).astype(dtype)
    return cut(_grouped(table_VD)).astype(dtype)


def _widened_rows(table: QuantizedMatrix, first, size) -> jax.Array:
    rows = TILE_ROWS if table.tiled else 1

    def cut(array: jax.Array) -> jax.Array:
        grouped = _grouped(array, table.shape[0])
        return lax.dynamic_slice_in_dim(grouped, first // rows, size // rows, axis=1)

    parts = jax.tree.map(cut, (table.codes, table.scale, table.offset))
    return QuantizedMatrix(*parts, table.table, table.tiled).dense()


def _logits(x_BTD, rows_GRD, soft_cap):
    logits_BTGR = jnp.einsum("BTD,GRD->BTGR", x_BTD, rows_GRD, **_exact(x_BTD.dtype))
    if soft_cap is not None:
        logits_BTGR = soft_cap * jnp.tanh(logits_BTGR / soft_cap)
    return logits_BTGR


def _cap_slope(logits: jax.Array, soft_cap: float | None) -> jax.Array | float:
    """What capped logits change by with those before the cap."""
    return 1.0 if soft_cap is None else 1 - jnp.square(logits / soft_cap)


def _label_rows(table_VD, labels_BT, dtype):
    """The table's rows of the labels, `[B, T, D]`; 0 for labels it has no row of."""
    V = table_VD.shape[0]
    ids_BT = jnp.clip(labels_BT, 0, V - 1)
    if isinstance(table_VD, QuantizedMatrix):
        rows_BTD = table_VD.rows(ids_BT)
    else:
        rows_BTD = jnp.take(table_VD, ids_BT, axis=0)
    known_BT = (labels_BT >= 0) & (labels_BT < V)
    return jnp.where(known_BT[..., None], rows_BTD.astype(dtype), 0)


def _is_label(labels_BT, V, first, size):
    G = _groups(V)
    ids_GR = jnp.arange(G)[:, None] * (V // G) + first + jnp.arange(size)
    return labels_BT[..., None, None] == ids_GR


def _exact(dtype):
    precision = lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
    return dict(precision=precision, preferred_element_type=jnp.float32)
