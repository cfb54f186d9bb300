"""The compiled token loop writes caches where they lie: it copies none of them.

Each token writes one slot per layer, so a loop that copies whole caches is slower the more slots
they have. XLA decides that by the shapes in which caches are carried, written and multiplied.
"""

import json
import re
from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from marks import nightly

from gemma_jax.inference.decode import advance, empty_state
from gemma_jax.inference.sampling import Sampling, SamplingRows
from gemma_jax.placement import shard
from gemma_jax.sharding import make_mesh

RUN_LONG = True  # as for users: what is copied is up to XLA
WINDOW, MAX_LEN, LONG = 136, 328, 1280  # a long one is read in blocks
DTYPES = ("float32", "bfloat16", "int8")
LAYERS, SLOTS, ENDS = (1, 2), (256, MAX_LEN, LONG), ((), (16,))  # a ring is of whole blocks of 128
# By day each size with each dtype and each layout, and each dtype in each layout.
SHAPES = [(*n, dtype) for n in ((1, 1), (1, 5), (3, 5), (3, 1)) for dtype in DTYPES]
BY_DAY, REST = (
    [(*shape, layout) for shape, layout in zip(SHAPES, layouts * 6)]
    for layouts in (("unrolled", "scan"), ("scan", "unrolled"))
)


@cache
def compiled_loop(
    heads: int, batch: int, dtype: str, layout: str, axis: str | None = None, max_len: int = MAX_LEN
) -> str:
    """The optimised program that adds tokens to `batch` rows."""
    cfg = tiny.gemma3(layers=3, window=WINDOW, num_heads=2 * heads, num_kv_heads=heads)
    model = tiny.model(cfg, layout)
    if axis is not None:
        model = shard(model, make_mesh(cfg, jax.devices()[:2], **{axis: 2}))
    state = empty_state(
        np.zeros(batch, np.uint32),
        SamplingRows.of([Sampling()] * batch, cfg.vocab_size),
        np.full((batch, 1), -1, np.int32),
        cfg=cfg,
        layer_groups=model.layer_groups,
        max_len=max_len,
        dtype=jnp.dtype(dtype),
        new_tokens=4,
        partition=model.runtime.partition,
    )
    return advance.lower(model, state, None, loop=True).compile().as_text()


def in_loops(program: str) -> list[str]:
    """Lines of all computations that a loop of the program runs, however deep."""
    lines, entry, name = {}, None, None
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line):
            name = head[2]
            lines[name], entry = [], name if head[1] else entry
        elif name is not None:
            lines[name].append(line)

    def called(computation: str, how: str) -> set[str]:
        return set(re.findall(rf"(?:{how})=%([\w.\-]+)", "\n".join(lines[computation])))

    outside = {entry} | called(entry, "calls|to_apply")
    found, waiting = set(), set().union(*(called(name, "body") for name in outside))
    while waiting:
        found.add(name := waiting.pop())
        waiting |= called(name, "body|condition|calls|to_apply") - found
    return [line for name in found for line in lines[name]]


def cache_copies(lines: list[str], batch: int, heads: int) -> list[str]:
    """Copies of keys, values or scales of a layer or a stack of layers."""
    arrays = [(*scale, *end) for scale in product(LAYERS, [batch], [heads], SLOTS) for end in ENDS]
    shapes = {tuple(n for n in shape if n > 1) for shape in arrays}
    copies = re.findall(r"= \w+(\[[\d,]+\])\S* copy\(", "\n".join(lines))
    return [c for c in copies if tuple(n for n in json.loads(c) if n > 1) in shapes]


@pytest.mark.parametrize("heads, batch, dtype, layout", [*BY_DAY, *nightly(*REST)])
def test_no_cache_is_copied_per_token(heads, batch, dtype, layout):
    assert cache_copies(in_loops(compiled_loop(heads, batch, dtype, layout)), batch, heads) == []


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("heads, batch", [(1, 1), (3, 5)])
def test_no_long_cache_is_copied_per_token(heads, batch, dtype):
    program = compiled_loop(heads, batch, dtype, "unrolled", max_len=LONG)
    assert cache_copies(in_loops(program), batch, heads) == []


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("heads, batch, axis", [(1, 6, "data"), (6, 1, "tensor")])
def test_no_cache_is_copied_per_token_on_a_mesh(heads, batch, axis, dtype):
    program = compiled_loop(heads, batch, dtype, "unrolled", axis)
    own = (batch // 2, heads) if axis == "data" else (batch, heads // 2)
    assert cache_copies(in_loops(program), *own) == []


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("heads, batch", [(1, 5), *nightly((1, 1), (3, 5))])
def test_a_call_copies_no_cache(heads, batch, dtype):
    """Neither into the loop nor out of it: a server calls it for every few tokens."""
    program = compiled_loop(heads, batch, dtype, "unrolled")
    assert cache_copies(program.splitlines(), batch, heads) == []


def test_copies_are_found_where_there_are_some():
    @jax.jit
    def loop(cache_BKSH):
        def body(carry):
            old_BKSH, i = carry
            new_BKSH = old_BKSH.at[:, :, i].set(jnp.sum(old_BKSH))
            return new_BKSH[::-1] + old_BKSH, i + 1

        return jax.lax.while_loop(lambda carry: carry[1] < 9, body, (cache_BKSH, 0))

    program = loop.lower(jnp.zeros((5, 3, MAX_LEN, 16))).compile().as_text()
    assert cache_copies(in_loops(program), 5, 3)
