"""Gradients of attention on Hopper, in the interpreter of Mosaic GPU, which looks for races, too.

Against float32, with at most twice the error of plain code of the same dtype. The interpreter takes
seconds for each block of a grid, so cases are few, and each of them is several at once.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_kernels.attention import AttentionSpec, causal_interval, last_of_block
from gemma_kernels.attention.hopper.backward import (
    BackwardBlocks,
    attention_backward_hopper,
    default_blocks,
)
from gemma_kernels.attention.mask import visible
from gemma_kernels.mosaic_gpu import SMEM_LIMIT, interpreter

SLOW = jax.__version_info__ < (0, 11)  # its interpreter takes thrice as long, without races
SMALL = BackwardBlocks()  # several tiles in short sequences


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; `first` is the position of the first key, `shuffled` disorders the keys."""

    name: str
    B: int = 1
    T: int
    S: int
    N: int
    K: int = 1
    H: int
    dtype: jnp.dtype = jnp.bfloat16
    window: int | None = None
    stated: bool = False
    soft_cap: float | None = None
    image: tuple[int, int] = (0, 0)
    lengths: tuple[int, ...] | None = None
    first: int = 0
    shuffled: bool = False

    @property
    def spec(self) -> AttentionSpec:
        window = self.window if self.stated else None
        return AttentionSpec(
            scale=self.H**-0.5, soft_cap=self.soft_cap, window=window, causal=self.stated
        )

    def mask(self):
        lengths = np.array(self.lengths or (self.T,) * self.B)[:, None]
        rows_T, rows_S = np.arange(self.T), np.arange(self.S)
        before = self.S - self.T
        q_pos = np.where(rows_T < lengths, self.first + before + rows_T, -1)
        kv_pos = np.where(rows_S < before + lengths, self.first + rows_S, -1)
        block = np.zeros_like(q_pos)
        block[:, slice(*self.image)] = 1
        q_pos, kv_pos, block = (jnp.asarray(x, jnp.int32) for x in (q_pos, kv_pos, block))
        lo, hi = causal_interval(q_pos, self.window, last_of_block(q_pos, block))
        return lo, hi, kv_pos


CASES = (
    Case(name="a window, stated", T=70, S=70, N=1, H=64, window=37, stated=True),
    Case(name="whole blocks of a far cache", T=20, S=100, N=3, H=256, first=200_000),
    Case(
        name="ragged, one row empty, soft cap, heads of 72, float16",
        B=2, T=21, S=21, N=1, H=72, dtype=jnp.float16, soft_cap=3.0, lengths=(13, 0),
    ),
    Case(name="causal, stated", T=70, S=70, N=1, H=64, stated=True),
    Case(name="an image over the edge of a tile", T=90, S=90, N=1, H=128, window=9, image=(50, 80)),
    Case(name="keys in any order, one query", T=1, S=60, N=4, K=2, H=64, window=50, shuffled=True),
)  # fmt: skip


def plain(q_BTNH, k_BSKH, v_BSKH, mask, spec):
    """Output and log-sum-exp by code that any user would write, in the dtype of the operands."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    einsum = partial(jnp.einsum, precision="highest", preferred_element_type=jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    scores_BKGTS = spec.scale * einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH)
    if spec.soft_cap is not None:
        scores_BKGTS = spec.soft_cap * jnp.tanh(scores_BKGTS / spec.soft_cap)
    seen_B11TS = visible(*mask)[:, None, None]
    some_B11T = seen_B11TS.any(-1)
    scores_BKGTS = jnp.where(seen_B11TS, scores_BKGTS, -1e30)
    lse_BKGT = jnp.where(some_B11T, jax.nn.logsumexp(scores_BKGTS, axis=-1), 0.0)
    weights_BKGTS = jnp.where(seen_B11TS, jnp.exp(scores_BKGTS - lse_BKGT[..., None]), 0.0)
    out_BTKGH = einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(q_BTNH.dtype), v_BSKH)
    lse_BKGT = jnp.where(some_B11T, lse_BKGT, -jnp.inf)
    lse_BTN = jnp.moveaxis(lse_BKGT, 3, 1).reshape(B, T, N)
    return out_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype), lse_BTN


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients(case):
    if SLOW and case is not CASES[0]:
        pytest.skip("the interpreter of jax 0.10 takes half a minute for it")
    keys = jax.random.split(jax.random.key(case.T), 6)
    q = jax.random.normal(keys[0], (case.B, case.T, case.N, case.H), case.dtype)
    k, v = (
        jax.random.normal(key, (case.B, case.S, case.K, case.H), case.dtype) for key in keys[1:3]
    )
    dout = jax.random.normal(keys[3], q.shape, case.dtype)
    dlse = jax.random.normal(keys[4], q.shape[:3])
    lo, hi, kv_pos = case.mask()
    if case.shuffled:
        order = jax.random.permutation(keys[5], case.S)
        k, v, kv_pos = k[:, order], v[:, order], kv_pos[:, order]

    def gradients(dtype):
        arrays = [x.astype(dtype) for x in (q, k, v)]
        (out, lse), pull = jax.vjp(lambda *x: plain(*x, (lo, hi, kv_pos), case.spec), *arrays)
        return pull((dout.astype(dtype), dlse)), out, lse

    exact, out, lse = jax.jit(gradients, static_argnums=0)(jnp.float32)
    rounded, _, _ = jax.jit(gradients, static_argnums=0)(case.dtype)
    mask = (None, None, None) if case.stated else (lo, hi, kv_pos)
    blocks = None if case.H == 256 else SMALL
    run = jax.jit(
        lambda *x: attention_backward_hopper(
            *x,
            *mask,
            case.spec,
            blocks=blocks,
            interpret=replace(interpreter(), detect_races=not SLOW),
        )
    )
    arrays = (q, k, v, out.astype(case.dtype), lse, dout, dlse)
    ours = run(*arrays)
    for name, mine, theirs, truth in zip(("dq", "dk", "dv"), ours, rounded, exact):
        error, allowed = (np.linalg.norm((x - truth).astype(np.float32)) for x in (mine, theirs))
        assert mine.dtype == case.dtype
        assert error <= 2 * allowed, name
    if case is CASES[0] and not SLOW:
        for first, second in zip(ours, run(*arrays)):
            np.testing.assert_array_equal(first, second)


def call(T=64, H=64, dtype=jnp.bfloat16, blocks=None):
    x = jax.ShapeDtypeStruct((1, T, 1, H), dtype)
    lse = jax.ShapeDtypeStruct((1, T, 1), jnp.float32)
    spec = AttentionSpec(scale=1.0, causal=True)
    run = partial(attention_backward_hopper, blocks=blocks, interpret=interpreter())
    jax.eval_shape(lambda q, lse: run(q, q, q, q, lse, q, None, None, None, None, spec), x, lse)


@pytest.mark.parametrize(
    "arguments, reason",
    [(dict(dtype=jnp.float32), "float32.*10 bits"), (dict(H=320), "320 wide.*256")],
)
def test_unsupported(arguments, reason):
    with pytest.raises(NotImplementedError, match=reason):
        call(**arguments)


@pytest.mark.parametrize("blocks", [BackwardBlocks(dkv_k=96), BackwardBlocks(dq_k=40)])
def test_blocks_that_do_not_fit(blocks):
    with pytest.raises(ValueError, match="multiple of"):
        call(blocks=blocks)


def test_blocks_beyond_shared_memory():
    assert default_blocks(256, None).smem(256) <= SMEM_LIMIT
    with pytest.raises(ValueError, match="shared memory.*stages"):
        call(H=256, blocks=BackwardBlocks(dkv_stages=4))
