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
from gemma_jax.remat import checkpointed
from gemma_jax.runtime import Runtime
from gemma_jax.weights.protocol import StandIn

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
    """What one block returns, or a stack of them.

    Attributes:
      x: The residual stream, or streams.
      cache: The layer's cache after this pass; those of all layers, from a stack.
      captured: Intermediates by name; per layer, from a stack.
      shared_kv: Kind of layer -> keys and values for later layers of the kind.
    """

    x: jax.Array
    cache: LayerCache | Caches | None = None
    captured: dict[str, jax.Array | tuple[jax.Array, ...]] = field(default_factory=dict)
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
    *,
    layers: range | None = None,
    method: str = "__call__",
) -> LayerOutput:
    """Runs layers in order.

    Args:
      caches: Of all layers.
      inputs: Arrays with one entry per layer along their first axis, which its block gets besides.
      layers: Which ones to run; default: all.
      method: Of the blocks, which takes and returns what `__call__` does.
    """

    for i, group in enumerate(layer_groups):
        _check_stacked(blocks[i], group, f"blocks.{i}")
    partition = ctx.runtime.partition
    device = None if partition is None else partition.mesh.devices.flat[0]
    run_block = checkpointed(partial(_run_block, method), ctx.runtime.remat_policy, device)

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
    new_caches = [list(group) for group in caches or ()]
    by_layer: dict[str, dict[int, jax.Array]] = {}
    lent: dict[str, KeysValues] = {}
    layers = range(depth) if layers is None else layers
    for i, group, places, repeats in _stretches(layer_groups, layers):
        old = (None,) * len(group.period) if caches is None else new_caches[i]
        extra = () if inputs is None else (_by_position(inputs, group, places, repeats, numbers),)
        body, stack = partial(run_period, ctx), tuple(blocks[i])[places]
        x, news, (found, shared) = _repeat(
            body, x, tuple(old[places]), stack, extra, repeats, group.repeats
        )
        if shared:  # such layers are not repeated: a kind of layer lends once
            shared = jax.tree.map(lambda a: a[0], shared)
            lent, ctx = lent | shared, ctx.share(shared)
        if caches is not None:
            new_caches[i][places] = news
        for position, by_name in enumerate(found, places.start):
            for name, values in by_name.items():
                rows = {group.layer_index(position, r): a for r, a in zip(repeats, values)}
                by_layer[name] = by_layer.get(name, {}) | rows
    captured = {name: _stack([rows[i] for i in sorted(rows)]) for name, rows in by_layer.items()}
    caches = None if caches is None else tuple(tuple(group) for group in new_caches)
    return LayerOutput(x=x, cache=caches, captured=captured, shared_kv=lent)


def _stretches(layer_groups: tuple[LayerGroup, ...], layers: range):
    for i, group in enumerate(layer_groups):
        for places, repeats in group.stretches(layers):
            yield i, group, places, repeats


def _check_stacked(blocks: nnx.List, group: LayerGroup, name: str) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(blocks):
        if leaf.shape[:1] != (group.repeats,):
            inside = jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")
            raise ValueError(
                f"{name}.{inside} has shape {list(leaf.shape)}, expected [{group.repeats}, ...]: "
                "parameters of blocks have an axis in front, of the layers that are stacked there; "
                "give it one, or make the model with Gemma(cfg, block=...)"
            )


@partial(jax.jit, static_argnums=0)
def _run_block(
    method: str,
    block: nnx.Module,
    x: jax.Array,
    ctx: Context,
    cache: LayerCache | None,
    *extra: Any,
) -> LayerOutput:
    """Part of the program around it, but traced once for all blocks that are alike."""
    out = getattr(block, method)(x, ctx, cache, *extra)
    if not isinstance(out, LayerOutput):
        kind = type(block).__name__
        raise TypeError(f"{kind} must return a LayerOutput, got {type(out).__name__}")
    return out


def _by_position(
    inputs: Any, group: LayerGroup, places: slice, repeats: range, numbers: tuple[jax.Array, ...]
) -> tuple[Any, ...]:
    """The part of per-layer inputs for some of a group: for each position, those of the repeats.

    Args:
      numbers: Of all layers; see `computed_once`.
    """
    length = len(group.period)
    start, end = (group.start + length * r for r in (repeats.start, repeats.stop))
    firsts = range(start, start + length)[places]
    if group.repeats == 1:
        at = partial(jax.lax.dynamic_slice_in_dim, slice_size=1)
        return tuple(jax.tree.map(lambda a, i=i: at(a, numbers[i]), inputs) for i in firsts)
    return tuple(jax.tree.map(lambda a, i=i: a[i:end:length], inputs) for i in firsts)


def _repeat(body, x, caches, blocks, extra, repeats: range, of: int):
    """Runs a period, or a part of one, for some of its repeats.

    Caches and blocks are stacked along all repeats, `of` in number; what comes besides and results
    along those that run. Caches are carried and written in place, in their stacks: as inputs and
    outputs of the scan there would be two of each, even of one that is donated. Of blocks that do
    not all run, each is read where it lies as well: a slice of their stacks would be a copy. So are
    weights whose kernels can do that.
    """
    if of == 1:
        caches, blocks, extra = jax.tree.map(
            lambda a: jax.lax.squeeze(a, (0,)), (caches, blocks, extra)
        )
        x, *results = body(x, blocks, caches, extra)
        return x, *jax.tree.map(lambda a: jax.lax.expand_dims(a, (0,)), results)
    whole = len(repeats) == of
    at = partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    leaves, tree = jax.tree.flatten(blocks, is_leaf=_reads_layers)
    scanned = [None if _reads_layers(leaf) else leaf for leaf in leaves]

    def block(arrays: list[Any], i: jax.Array) -> Any:
        own = [leaf.at_layer(i) if a is None else a for leaf, a in zip(leaves, arrays)]
        return jax.tree.unflatten(tree, own)

    def step(carry, xs):
        x, caches = carry
        i, (own, extra) = xs
        own = own if whole else jax.tree.map(lambda a: at(a, i), scanned)
        x, new, results = body(x, block(own, i), _at(caches, i), extra)
        return (x, _at(new, None)), results

    if len(repeats) == 1:
        alone = (jnp.int32(repeats.start), ((), jax.tree.map(lambda a: a[0], extra)))
        (x, caches), results = step((x, caches), alone)
        return x, caches, jax.tree.map(lambda a: jax.lax.expand_dims(a, (0,)), results)
    numbers = jnp.arange(repeats.start, repeats.stop)
    over = (numbers, (scanned if whole else (), extra))
    (x, caches), results = jax.lax.scan(step, (x, caches), over)
    return x, caches, results


def _reads_layers(leaf: Any) -> bool:
    return isinstance(leaf, StandIn) and leaf.reads_layers


def _at(caches: tuple[LayerCache | None, ...], layer: jax.Array | None):
    """Stacks of caches, of which a layer is meant, or none."""
    return tuple(cache and replace(cache, layer=layer) for cache in caches)


def _stack(rows: list[jax.Array]) -> jax.Array | tuple[jax.Array, ...]:
    return jnp.stack(rows) if len({row.shape for row in rows}) == 1 else tuple(rows)
