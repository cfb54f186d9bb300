"""The stack of layers: stacked parameters, and the scan that runs them."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.cache import LayerCache
from gemma_jax.config import LayerSpec
from gemma_jax.context import Context
from gemma_jax.segments import Segment

Caches = tuple[tuple[LayerCache, ...], ...]


def stack_layers(
    make_block: Callable[[LayerSpec, nnx.Rngs], nnx.Module],
    segments: tuple[Segment, ...],
    rngs: nnx.Rngs,
) -> nnx.List:
    """`blocks[segment][position]`: a block whose parameters have a leading axis of `repeats`."""

    # Traced once per distinct spec: building even an abstract 62-layer model stays cheap.
    @partial(jax.jit, static_argnums=(1, 2))
    def stack(key: jax.Array, spec: LayerSpec, repeats: int) -> nnx.Module:
        keys = jax.random.split(key, repeats)
        return jax.vmap(lambda key: make_block(spec, nnx.Rngs(key)))(keys)

    return nnx.List(
        nnx.List(stack(rngs(), spec, seg.repeats) for spec in seg.period) for seg in segments
    )


def run_layers(
    blocks: nnx.List,
    segments: tuple[Segment, ...],
    x: jax.Array,
    ctx: Context,
    caches: Caches | None,
) -> tuple[jax.Array, Caches | None, dict[str, jax.Array | tuple[jax.Array, ...]]]:
    """Runs all layers in order: `(x, caches after the pass, name -> per-layer results)`."""

    def run_period(x, period):
        news, taps = [], []
        for block, old in zip(*period):
            x, new, tap = _run_block(block, x, ctx, old)
            news.append(new)
            taps.append({name: tap[name] for name in tap.keys() & ctx.capture})
        return x, (tuple(news), tuple(taps))

    new_caches, by_layer = [], {}
    for i, seg in enumerate(segments):
        old = (None,) * len(seg.period) if caches is None else caches[i]
        x, (news, taps) = _scan(run_period, x, (tuple(blocks[i]), old), seg.repeats)
        new_caches.append(news)
        for position, tap in enumerate(taps):
            for name, values in tap.items():
                rows = {seg.layer_index(position, r): values[r] for r in range(seg.repeats)}
                by_layer[name] = by_layer.get(name, {}) | rows
    captured = {name: _stack([rows[i] for i in sorted(rows)]) for name, rows in by_layer.items()}
    return x, None if caches is None else tuple(new_caches), captured


@jax.jit
def _run_block(block: nnx.Module, x: jax.Array, ctx: Context, cache: LayerCache | None):
    """Part of the program around it, but traced once for all blocks that are alike."""
    return block(x, ctx, cache)


def _scan(body, x, xs, repeats: int):
    if repeats > 1:
        return jax.lax.scan(body, x, xs)
    x, ys = body(x, jax.tree.map(lambda a: a[0], xs))
    return x, jax.tree.map(lambda a: a[None], ys)


def _stack(rows: list[jax.Array]) -> jax.Array | tuple[jax.Array, ...]:
    return jnp.stack(rows) if len({row.shape for row in rows}) == 1 else tuple(rows)
