"""The stack of layers: stacked parameters, and the scan that runs them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.compat import computed_once
from gemma_jax.config import LayerSpec
from gemma_jax.nn.layer_groups import LayerGroup
from gemma_jax.runtime import Runtime

KeysValues = Any  # what a layer shares with later ones is theirs to define


class LayerCache(Protocol):
    """The cache of a layer, or a stack of them of which `layer` is meant; a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def layer(self) -> jax.Array | None: ...


class Context(Protocol):
    """What a pass knows, as far as the stack must: a pytree that blocks read more of."""

    @property
    def runtime(self) -> Runtime: ...

    @property
    def capture(self) -> frozenset[str]: ...

    def place(self, x: jax.Array) -> jax.Array:
        """The residual stream where the mesh has it."""
        ...

    def share(self, shared_kv: dict[str, KeysValues]) -> Self:
        """The context with keys and values that later layers read."""
        ...


Caches = tuple[tuple[LayerCache | None, ...], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LayerOutput:
    """What one block returns.

    Attributes:
      x: The residual stream, or streams.
      cache: The layer's cache after this pass.
      captured: Intermediates by name.
      shared_kv: Kind of layer -> keys and values for later layers of the kind.
    """

    x: jax.Array
    cache: LayerCache | None = None
    captured: dict[str, jax.Array] = field(default_factory=dict)
    shared_kv: dict[str, KeysValues] = field(default_factory=dict)


def stack_layers(
    make_block: Callable[[LayerSpec, nnx.Rngs], nnx.Module],
    layer_groups: tuple[LayerGroup, ...],
    rngs: nnx.Rngs,
) -> nnx.List:
    """`blocks[group][position]`: a block whose parameters have a leading axis of `repeats`."""

    # Traced once per distinct spec: building even an abstract 62-layer model stays cheap.
    @partial(jax.jit, static_argnums=(1, 2))
    def stack(key: jax.Array, spec: LayerSpec, repeats: int) -> nnx.Module:
        keys = jax.random.split(key, repeats)
        return jax.vmap(lambda key: make_block(spec, nnx.Rngs(key)))(keys)

    return nnx.List(
        nnx.List(stack(rngs(), spec, group.repeats) for spec in group.period)
        for group in layer_groups
    )


def run_layers(
    blocks: nnx.List,
    layer_groups: tuple[LayerGroup, ...],
    x: jax.Array,
    ctx: Context,
    caches: Caches | None,
    inputs: Any = None,
) -> tuple[jax.Array, Caches | None, dict[str, jax.Array | tuple[jax.Array, ...]]]:
    """Runs all layers in order: `(x, caches after the pass, name -> per-layer results)`.

    Args:
      inputs: Arrays with one entry per layer along their first axis, which its block gets besides.
    """

    for i, group in enumerate(layer_groups):
        _check_stacked(blocks[i], group, f"blocks.{i}")
    run_block = jax.checkpoint(_run_block) if ctx.runtime.remat else _run_block

    def run_period(ctx, x, blocks, old_caches, inputs):
        news, captured, shared = [], [], {}
        for block, old, *extra in zip(blocks, old_caches, *inputs):
            out = run_block(block, ctx.place(x), ctx, old, *extra)
            x, shared = out.x, shared | out.shared_kv
            ctx = ctx.share(out.shared_kv) if out.shared_kv else ctx
            news.append(out.cache)
            wanted = out.captured.keys() & ctx.capture
            captured.append({name: out.captured[name] for name in wanted})
        return x, tuple(news), (tuple(captured), shared)

    depth = sum(len(group.period) * group.repeats for group in layer_groups)
    numbers = ()
    if jax.tree.leaves(inputs):
        numbers = computed_once(lambda: tuple(jnp.uint32(i) for i in range(depth)))
    new_caches, by_layer = [], {}
    for i, group in enumerate(layer_groups):
        old = (None,) * len(group.period) if caches is None else caches[i]
        extra = () if inputs is None else (_by_position(inputs, group, numbers),)
        body = partial(run_period, ctx)
        x, news, (found, shared) = _repeat(body, x, old, (tuple(blocks[i]), extra), group.repeats)
        if shared:  # such a group is not repeated: a kind of layer lends once
            ctx = ctx.share(jax.tree.map(lambda a: a[0], shared))
        new_caches.append(news)
        for position, by_name in enumerate(found):
            for name, values in by_name.items():
                rows = {group.layer_index(position, r): values[r] for r in range(group.repeats)}
                by_layer[name] = by_layer.get(name, {}) | rows
    captured = {name: _stack([rows[i] for i in sorted(rows)]) for name, rows in by_layer.items()}
    return x, None if caches is None else tuple(new_caches), captured


def _check_stacked(blocks: nnx.List, group: LayerGroup, name: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(blocks):
        if leaf.shape[:1] != (group.repeats,):
            inside = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            raise ValueError(
                f"{name}.{inside} has shape {list(leaf.shape)}, expected [{group.repeats}, ...]: "
                "parameters of blocks have an axis in front, of the layers that are stacked there; "
                "give it one, or make the model with Gemma(cfg, block=...)"
            )


@jax.jit
def _run_block(
    block: nnx.Module, x: jax.Array, ctx: Context, cache: LayerCache | None, *extra: Any
) -> LayerOutput:
    """Part of the program around it, but traced once for all blocks that are alike."""
    out = block(x, ctx, cache, *extra)
    if not isinstance(out, LayerOutput):
        kind = type(block).__name__
        raise TypeError(f"{kind} must return a LayerOutput, got {type(out).__name__}")
    return out


def _by_position(inputs: Any, group: LayerGroup, numbers: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    """The group's part of per-layer inputs: for each position, those of all repeats.

    Args:
      numbers: Of all layers; see `computed_once`.
    """
    length = len(group.period)
    if group.repeats == 1:
        at = partial(jax.lax.dynamic_slice_in_dim, slice_size=1)
        return tuple(
            jax.tree.map(lambda a, i=i: at(a, numbers[i]), inputs)
            for i in range(group.start, group.start + length)
        )
    end = group.start + length * group.repeats
    return tuple(
        jax.tree.map(lambda a, p=p: a[group.start + p : end : length], inputs)
        for p in range(length)
    )


def _repeat(body, x, caches, weights, repeats: int):
    """Runs a period so many times; caches, weights and results are stacked along the repeats.

    Caches are carried and written in place, in their stacks: as inputs and outputs of the scan
    there would be two of each, even of one that is donated.
    """
    if repeats == 1:
        caches, (blocks, extra) = jax.tree.map(
            lambda a: jax.lax.squeeze(a, (0,)), (caches, weights)
        )
        x, *results = body(x, blocks, caches, extra)
        return x, *jax.tree.map(lambda a: jax.lax.expand_dims(a, (0,)), results)

    def step(carry, xs):
        x, caches = carry
        i, (blocks, extra) = xs
        x, new, results = body(x, blocks, _at(caches, i), extra)
        return (x, _at(new, None)), results

    (x, caches), results = jax.lax.scan(step, (x, caches), (jnp.arange(repeats), weights))
    return x, caches, results


def _at(caches: tuple[LayerCache | None, ...], layer: jax.Array | None):
    """Stacks of caches, of which a layer is meant, or none."""
    return tuple(cache and replace(cache, layer=layer) for cache in caches)


def _stack(rows: list[jax.Array]) -> jax.Array | tuple[jax.Array, ...]:
    return jnp.stack(rows) if len({row.shape for row in rows}) == 1 else tuple(rows)
