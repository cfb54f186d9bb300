"""Key/value caches: a ring of the window for local layers, the full length for global ones, none
for layers that share those of another.

A token at position `p` lives in slot `p % capacity`, so a full cache is a ring that never wraps.
Positions are stored once per capacity, not once per layer, and masks are made from them alone:
an empty slot holds -1. Rows of a batch may have different lengths.

Key/value heads come before slots: so a kernel's copy of some slots is whole tiles of a TPU's
memory, however few heads there are.

Caches may be narrower than activations, down to int8 with a scale per token and head. Whatever goes
through a cache is rounded before any query sees it, also within the pass that brings it: so a
prompt in pieces gives what it gives in one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.nn.layer_groups import LayerGroup
from gemma_jax.sharding import Partition
from gemma_jax.weights.int8 import to_int8
from gemma_kernels.platform import target_platform

BLOCK = 128  # slots: kernels read whole ones
ARRAYS = ("k_BKSH", "v_BKSH", "k_scale_BKS", "v_scale_BKS")  # of a layer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Rotated keys and values of one layer, `[B, K, S, H]`, or of several, `[L, B, K, S, H]`.

    A `Cache` stacks the layers of a group that share a place in its period. Such a stack is
    written and read where it lies: what is cut out of it would be copied, at every token.

    Attributes:
      k_scale_BKS, v_scale_BKS: float32 factors of int8 keys and values; `None` for others.
      layer: int32; the one of the stack that is meant.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_scale_BKS: jax.Array | None = None
    v_scale_BKS: jax.Array | None = None
    layer: jax.Array | None = None

    @property
    def capacity(self) -> int:
        return self.k_BKSH.shape[-2]

    @property
    def arrays(self) -> dict[str, jax.Array]:
        """Keys, values and, if there are any, their scales."""
        named = {name: getattr(self, name) for name in ARRAYS}
        return {name: array for name, array in named.items() if array is not None}

    @property
    def dims(self) -> "LayerCache":
        """The same with the letters of each array in its place."""
        stack = "" if self.layer is None else "L"
        letters = {name: stack + name.rpartition("_")[2] for name in self.arrays}
        return LayerCache(**letters, layer=None if self.layer is None else "")

    def packed(self) -> "LayerCache":
        """One layer's keys and values without axes of size 1 before slots; a stack as it is.

        What a loop carries, writes and multiplies in one shape, XLA's CPU backend does not copy. It
        takes axes of size 1 out of products, and a cache that has them elsewhere is then copied
        whole, up to five times at every token.
        """
        if target_platform() != "cpu" or len(self.k_BKSH) > 1:
            return self
        return jax.tree.map(lambda a: a.squeeze([i for i in range(3) if a.shape[i] == 1]), self)

    def of_layer(self) -> "LayerCache":
        """Keys and values of the layer alone."""
        if self.layer is None:
            return self
        at = partial(jax.lax.dynamic_index_in_dim, index=self.layer, keepdims=False)
        return LayerCache(**{name: at(array) for name, array in self.arrays.items()})

    def widened(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Keys and values as numbers of the dtype, whatever they are stored as."""
        if self.k_scale_BKS is None:
            return self.k_BKSH.astype(dtype), self.v_BKSH.astype(dtype)
        pairs = (self.k_BKSH, self.k_scale_BKS), (self.v_BKSH, self.v_scale_BKS)
        return tuple((x * scale[..., None]).astype(dtype) for x, scale in pairs)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeysValues:
    """What the queries of one pass attend to.

    Attributes:
      kv: Rotated keys, and values.
      kv_pos_BS: Their positions, -1 for slots to be ignored.
      in_order: Whether they come in the order of the queries (see `AttentionSpec.window`).
    """

    kv: LayerCache
    kv_pos_BS: jax.Array
    in_order: bool = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Holds the keys and values of earlier tokens of all layers, in the layer groups of the model.

    Attributes:
      layers: `layers[group][position in the period]`; `None` for layers without one.
      positions: capacity -> int32 `[B, capacity]`, -1 where empty.
      max_len: Longest sequence that fits, in tokens.
      slack: How many tokens beyond one a single pass may write into a ring without evicting a key
        that its own first query needs (0 for plain decoding).

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model, tok = gj.load("checkpoints/digits")
      >>> cache = gj.init_cache(model.cfg, model.layer_groups, batch=1, max_len=16, dtype="float32")
      >>> out = gj.forward(model, np.array([tok.encode("Which digit is left?")]), cache=cache)
      >>> out.cache.length_B
      Array([5], dtype=int32)
    """

    layers: tuple[tuple[LayerCache | None, ...], ...]
    positions: dict[int, jax.Array]
    max_len: int = field(metadata={"static": True})
    slack: int = field(default=0, metadata={"static": True})

    def capacity(self, spec: LayerSpec) -> int:
        return layer_capacity(spec, self.max_len, self.slack)

    @property
    def length_B(self) -> jax.Array:
        """Position of the next token of each row."""
        return jnp.max(self.positions[self.max_len], axis=1) + 1

    def shardings(self, partition: Partition) -> "Cache":
        """The cache with a sharding in the place of each array."""

        def at(dims: str, a: jax.Array) -> NamedSharding:
            # Rings are short: each device of a row keeps all slots of its heads.
            slots = a.shape[len(a.shape) - len(dims) + dims.index("S")]
            dims = dims if slots == self.max_len else dims.replace("S", "_")
            return partition.sharding(dims, a.shape)

        return replace(
            self,
            layers=jax.tree.map(lambda a: at("BKSH"[: a.ndim - 1], a), self.layers),
            positions={c: at("BS", a) for c, a in self.positions.items()},
        )

    def rewound(self, length_B: jax.Array) -> "Cache":
        """The cache without tokens at positions of `length` and beyond.

        Tokens that they have evicted do not come back: rings need a slack of as many tokens.
        """
        return replace(
            self,
            positions={
                capacity: jnp.where(pos_BS < length_B[:, None], pos_BS, -1)
                for capacity, pos_BS in self.positions.items()
            },
        )

    def cleared(self, empty_B: jax.Array) -> "Cache":
        """The cache with nothing in the rows that are `True`."""
        return self.rewound(jnp.where(empty_B, 0, self.max_len))

    def with_row(self, row: jax.Array, other: "Cache") -> "Cache":
        """The cache with the first row of another one, of the same capacities, in place of a row.

        Args:
          row: int32; its number.
        """

        def put(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            first = jax.lax.slice_in_dim(new, 0, 1, axis=axis)
            return jax.lax.dynamic_update_slice_in_dim(old, first, row, axis=axis)

        return self.by_rows(put, other)

    def by_rows(self, change: Callable[..., jax.Array], *others: "Cache") -> "Cache":
        """The cache with each array as a function makes it of that array, those in its place in
        other caches, and the number of the axis that is their rows."""
        layers = jax.tree.map(partial(change, axis=1), self.layers, *(o.layers for o in others))
        positions = {
            c: change(pos_BS, *(o.positions[c] for o in others), axis=0)
            for c, pos_BS in self.positions.items()
        }
        return replace(self, layers=layers, positions=positions)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """How one pass over new tokens meets the caches of one capacity.

    Attributes:
      write_BT: Slot of each new token. `capacity`, which is out of range, drops it: padding, or a
        token that a later one of the same pass would overwrite.
      order_BS: Attention reads the old slots and the new tokens, joined and put into this order;
        `None`: it reads the cache after the write.
      kv_pos_BS: Positions of the keys that attention reads.
    """

    write_BT: jax.Array
    order_BS: jax.Array | None
    kv_pos_BS: jax.Array


def layer_capacity(spec: LayerSpec, max_len: int, slack: int = 0) -> int:
    """Slots a layer needs for sequences of up to `max_len` tokens."""
    if spec.window is None:
        return max_len
    ring = spec.window + slack
    if ring > BLOCK:
        ring = -(-ring // BLOCK) * BLOCK
    return min(ring, max_len)


def init_cache(
    cfg: GemmaConfig,
    layer_groups: tuple[LayerGroup, ...],
    batch: int,
    max_len: int,
    dtype: jax.typing.DTypeLike,
    slack: int = 0,
) -> Cache:
    """Makes an empty key/value cache for `batch` rows of up to `max_len` tokens.

    Args:
      dtype: Of keys and values; int8 comes with float32 scales.
      slack: See `Cache`.

    Raises:
      ValueError: A model that reads both ways, which has no cache and writes no text.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits")
      >>> cache = gj.init_cache(model.cfg, model.layer_groups, batch=2, max_len=64, dtype="int8")
      >>> sorted(cache.layers[0][0].arrays), cache.max_len
      (['k_BKSH', 'k_scale_BKS', 'v_BKSH', 'v_scale_BKS'], 64)
    """
    cfg.require_causal("writes none: it has no cache")

    def layer(spec: LayerSpec, repeats: int) -> LayerCache | None:
        if not spec.makes_keys:
            return None
        head_dim, num_kv_heads = cfg.heads_of(spec)
        capacity = layer_capacity(spec, max_len, slack)
        shape = (repeats, batch, num_kv_heads, capacity, head_dim)
        cache = LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        if jnp.dtype(dtype) != jnp.int8:
            return cache
        ones = jnp.ones(shape[:-1], jnp.float32), jnp.ones(shape[:-1], jnp.float32)
        return replace(cache, k_scale_BKS=ones[0], v_scale_BKS=ones[1])

    capacities = {max_len} | {layer_capacity(spec, max_len, slack) for spec in cfg.layers}
    return Cache(
        layers=tuple(
            tuple(layer(s, group.repeats) for s in group.period) for group in layer_groups
        ),
        positions={c: jnp.full((batch, c), -1, jnp.int32) for c in sorted(capacities)},
        max_len=max_len,
        slack=slack,
    )


def cache_bytes(cfg: GemmaConfig, batch: int, max_len: int, dtype: jax.typing.DTypeLike) -> int:
    """Counts the bytes of keys, values and scales that `init_cache` allocates (without positions).

    None for a model that reads both ways, which has no cache.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.cache_bytes(gj.preset("gemma3-270m"), batch=1, max_len=32_768, dtype="bfloat16")
      108527616
    """
    if cfg.bidirectional:
        return 0
    dtype = jnp.dtype(dtype)
    scale = 4 if dtype == jnp.int8 else 0

    def per_slot(head_dim: int, num_kv_heads: int) -> int:
        return 2 * batch * num_kv_heads * (head_dim * dtype.itemsize + scale)

    owners = (spec for spec in cfg.layers if spec.makes_keys)
    return sum(layer_capacity(spec, max_len) * per_slot(*cfg.heads_of(spec)) for spec in owners)


def plan_slots(cache: Cache, pos_BT: jax.Array) -> tuple[dict[int, Slots], dict[int, jax.Array]]:
    """Slots by capacity for new tokens at `pos_BT`, and the cache's positions after the write.

    A pass writes first and reads the cache alone where nothing it needs is evicted: in full
    caches always, in rings for up to `1 + slack` tokens. Longer passes read old and new keys
    together, ordered by position: empty slots and left padding first, right padding last, so that
    keys end up in the order of the queries (the promise of `AttentionSpec.window`).
    """
    slots, after = {}, {}
    last_B1 = jnp.max(pos_BT, axis=1, keepdims=True)
    for capacity, old_BS in cache.positions.items():
        keep_BT = (pos_BT >= 0) & (pos_BT < cache.max_len) & (pos_BT > last_B1 - capacity)
        write_BT = jnp.where(keep_BT, pos_BT % capacity, capacity)
        # XLA for TPUs would carry the result of the scatter in one dimension, into layouts that it
        # cannot give to whatever reads it (8 rows of 131,072 slots on a v5e).
        after[capacity] = jax.lax.optimization_barrier(_write(old_BS, pos_BT, write_BT))
        if capacity == cache.max_len or pos_BT.shape[1] <= 1 + cache.slack:
            slots[capacity] = Slots(write_BT, None, after[capacity])
        else:
            joined_BS = jnp.concatenate([old_BS, pos_BT], axis=1)
            first_B1 = jnp.argmax(pos_BT >= 0, axis=1, keepdims=True)
            after_first_BT = jnp.arange(pos_BT.shape[1]) > first_B1
            rank_BT = jnp.where((pos_BT < 0) & after_first_BT, cache.max_len, pos_BT)
            order_BS = jnp.argsort(jnp.concatenate([old_BS, rank_BT], axis=1), axis=1, stable=True)
            kv_pos_BS = jnp.take_along_axis(joined_BS, order_BS, axis=1)
            slots[capacity] = Slots(write_BT, order_BS, kv_pos_BS)
    return slots, after


def extend(
    cache: LayerCache,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    slots: Slots,
    write: Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array],
) -> tuple[LayerCache, LayerCache]:
    """Keys and values for attention (at `slots.kv_pos_BS`), and the cache after the write.

    Args:
      write: `write_heads`, or what does the same on a mesh.
    """
    new = _stored(k_BKTH, v_BKTH, cache.k_BKSH.dtype).arrays
    written = {
        name: write(old, new[name], slots.write_BT, cache.layer)
        for name, old in cache.arrays.items()
    }
    after = LayerCache(**written, layer=cache.layer)
    if slots.order_BS is None:
        return after, after

    def join(old: jax.Array, new: jax.Array) -> jax.Array:
        order = slots.order_BS.reshape(len(old), 1, -1, *(1,) * (old.ndim - 3))
        return jnp.take_along_axis(jnp.concatenate([old, new], axis=2), order, axis=2)

    old = cache.of_layer().arrays
    return LayerCache(**{name: join(old[name], new[name]) for name in old}), after


def _stored(k_BKTH: jax.Array, v_BKTH: jax.Array, dtype: jnp.dtype) -> LayerCache:
    """Keys and values as a cache of the dtype holds them."""
    if dtype != jnp.int8:
        return LayerCache(k_BKTH.astype(dtype), v_BKTH.astype(dtype))
    (k_BKTH, k_scale_BKT), (v_BKTH, v_scale_BKT) = (to_int8(x, (3,)) for x in (k_BKTH, v_BKTH))
    return LayerCache(k_BKTH, v_BKTH, k_scale_BKT, v_scale_BKT)


def write_heads(
    old_BKSH: jax.Array, new_BKTH: jax.Array, slot_BT: jax.Array, layer: jax.Array | None
) -> jax.Array:
    """The cache, or the layer's in a stack of them, with new tokens in their slots.

    Scales, `[B, K, S]`, are written alike.
    """
    B, K, T = new_BKTH.shape[:3]
    on_cpu, S = target_platform() == "cpu", old_BKSH.shape[2 if layer is None else 3]
    if on_cpu and B * K * T == 1:
        # Of one token XLA would make a slice update, which it fuses with whatever reads the cache
        # and does once more for the loop: it copies the cache for that. The second one is dropped.
        new_BKTH = jnp.repeat(new_BKTH, 2, axis=2)
        slot_BT = jnp.concatenate([slot_BT, jnp.full_like(slot_BT, S)], axis=1)
    # With an index for each row and head: of anything shorter, XLA for TPUs makes a scatter that
    # wants the cache in another layout, and copies all of it.
    row_B11, head_1K1 = jnp.arange(B)[:, None, None], jnp.arange(K)[None, :, None]
    at = (row_B11, head_1K1, slot_BT[:, None])
    if layer is not None:
        return old_BKSH.at[(layer, *at)].set(new_BKTH, mode="drop")
    if not on_cpu:
        return old_BKSH.at[at].set(new_BKTH, mode="drop")
    # In the shape that `LayerCache.packed` has.
    unit = [axis for axis in (0, 1) if new_BKTH.shape[axis] == 1]
    at = tuple(index.squeeze(unit) for axis, index in enumerate(at) if axis not in unit)
    return (
        old_BKSH.squeeze(unit)
        .at[at]
        .set(new_BKTH.squeeze(unit), mode="drop")
        .reshape(old_BKSH.shape)
    )


def write_heads_on(partition: Partition, full: bool) -> Callable[..., jax.Array]:
    """`write_heads`, on every device for its rows and heads.

    Args:
      full: Whether the caches are of the whole length, whose slots may be split.
    """
    split = full and partition.splits("S")

    def write(old_BKSH, new_BKTH, slot_BT, layer):
        ends = "H"[: new_BKTH.ndim - 3]  # scales have no H
        dims = f"BKS{ends}" if layer is None else f"LBKS{ends}"

        def part(old_BKSH, new_BKTH, slot_BT, *layer):
            if split:
                own = old_BKSH.shape[dims.index("S")]
                slot_BT = slot_BT - partition.index("S") * own
                slot_BT = jnp.where((slot_BT >= 0) & (slot_BT < own), slot_BT, own)
            return write_heads(old_BKSH, new_BKTH, slot_BT, *layer or (None,))

        operands = [(dims, old_BKSH), (f"BKT{ends}", new_BKTH), ("BT", slot_BT)]
        operands += [] if layer is None else [("", layer)]
        return partition.run(part, dims, *operands, whole="" if split else "S")

    return write


@partial(jax.vmap, in_axes=(0, 0, 0))
def _write(old_S, new_T, slot_T):
    return old_S.at[slot_T].set(new_T, mode="drop")
