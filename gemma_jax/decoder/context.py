"""What all layers of one forward pass share: computed once, read by every block."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax.compat import computed_once
from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import KeysValues, Slots
from gemma_jax.decoder.patching import Patches, patched
from gemma_jax.nn.ffn import deviations_below
from gemma_jax.nn.rope import RopeTable, rope_table
from gemma_jax.runtime import Runtime
from gemma_kernels.attention import (
    causal_interval,
    first_of_document,
    last_of_block,
    two_sided_interval,
)

Rope = tuple[float, float, float, int]  # theta, scale, share, width of a head; 0 for the model's


def rope_of(spec: LayerSpec) -> Rope:
    """What layers with one rope table have in common."""
    return spec.rope_theta, spec.rope_scale, spec.rotary_share, spec.head_dim or 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Context:
    """Positions, masks, rope tables and cache slots of one forward pass.

    Attributes:
      pos_BT: Positions of the new tokens, -1 for padding.
      intervals: window (0 for global) -> `(lo_BT, hi_BT)`, the key positions each query sees.
      tables: What `rope_of` says of a layer -> its rope table.
      deviations: sparsity -> where the threshold of a sparse layer lies.
      slots: cache capacity -> where new tokens go; empty without a cache.
      in_order: Whether queries stand in the order of the keys, and none sees a key after its own.
        They do not where some of them are left out; bidirectional blocks and models see what comes
        after.
      static_mask: Whether rows are whole texts without padding or soft tokens, so that masks are
        known at compile time.
      capture: Names of intermediate results to return.
      patch: What takes the place of intermediate results, by name.
      layer: int32, the number of the layer that runs; `None` before and after them, and where
        nothing in them is patched.
      shared_kv: kind of layer -> keys and values that layers of the kind read in the place of
        their own.
    """

    runtime: Runtime = field(metadata={"static": True})
    pos_BT: jax.Array
    intervals: dict[int, tuple[jax.Array, jax.Array]]
    tables: dict[Rope, RopeTable]
    deviations: dict[float, jax.Array]
    slots: dict[int, Slots]
    in_order: bool = field(metadata={"static": True})
    static_mask: bool = field(metadata={"static": True})
    capture: frozenset[str] = field(metadata={"static": True})
    patch: Patches = field(default_factory=dict)
    layer: jax.Array | None = None
    shared_kv: dict[str, KeysValues] = field(default_factory=dict)

    def note(self, captured: dict[str, jax.Array], name: str, x: jax.Array) -> jax.Array:
        """The value to go on with: `x`, or what a patch makes of it. `captured` keeps it if wanted.

        The one place that all intermediate results with a name pass.
        """
        x = patched(self.patch.get(name, ()), name, x, self.layer)
        if name in self.capture:
            captured[name] = x
        return x

    def share(self, shared_kv: dict[str, KeysValues]) -> "Context":
        """The context with keys and values that later layers read."""
        return replace(self, shared_kv=self.shared_kv | shared_kv)

    def at(self, chosen_BT: jax.Array) -> "Context":
        """The context for the queries of some tokens alone; keys stay what they are.

        Args:
          chosen_BT: int32, which ones out of each row.
        """
        by_token = {
            "pos_BT": self.pos_BT,
            "intervals": self.intervals,
            "tables": self.tables,
        }
        some = jax.tree.map(lambda a: tokens_at(chosen_BT, a, axis=1), by_token)
        return replace(self, **some, in_order=False, static_mask=False)

    def place(self, x: jax.Array) -> jax.Array:
        """A residual stream `[B, T, D]`, or streams `[A, B, T, D]`, where the mesh has it."""
        if (partition := self.runtime.partition) is None:
            return x
        return partition.constrain_activations(x, "ABTD"[-x.ndim :])

    def interval(self, spec: LayerSpec) -> tuple[jax.Array, jax.Array]:
        return self.intervals[spec.window or 0]

    def table(self, spec: LayerSpec) -> RopeTable:
        return self.tables[rope_of(spec)]


def tokens_at(chosen_BT: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """Some tokens of an array that has rows along the axis before `axis`, and tokens along it.

    Args:
      chosen_BT: int32, which ones out of each row.
    """
    others = (*range(axis - 1), *range(axis + 1, x.ndim))
    return jnp.take_along_axis(x, jnp.expand_dims(chosen_BT, others), axis=axis)


def make_context(
    cfg: GemmaConfig,
    runtime: Runtime,
    batch: Batch,
    *,
    static_mask: bool,
    slots: dict[int, Slots],
    capture: frozenset[str],
    patch: Patches,
) -> Context:
    """One mask per window and one rope table per base, however many layers there are.

    Args:
      batch: With positions.
    """
    numerics = runtime.numerics
    pos_BT, rope_pos_BT = batch.positions_BT, batch.rope_positions_BT
    block_BT = None if batch.soft is None else batch.soft.block_BT
    last_BT = None if block_BT is None else last_of_block(pos_BT, block_BT)
    first_BT = None
    if batch.documents_BT is not None:
        if slots:
            raise ValueError("packed documents_BT go through a pass of their own, without a cache")
        cfg.require_causal("packs no documents in one row")
        first_BT = jnp.take_along_axis(pos_BT, first_of_document(batch.documents_BT), axis=1)
        rope_pos_BT = pos_BT - first_BT if rope_pos_BT is None else rope_pos_BT
    rope_pos_BT = pos_BT if rope_pos_BT is None else rope_pos_BT
    sparsities = sorted({spec.sparsity for spec in cfg.layers if spec.sparsity})
    windows = {spec.window for spec in cfg.layers}
    ropes = {rope_of(spec) for spec in cfg.layers}

    def interval(window: int | None) -> tuple[jax.Array, jax.Array]:
        if not cfg.bidirectional:
            return causal_interval(pos_BT, window, last_BT, first_BT)
        return two_sided_interval(pos_BT, None if window is None else window - 1)

    def table(theta: float, scale: float, share: float, head_dim: int) -> RopeTable:
        return rope_table(rope_pos_BT, head_dim or cfg.head_dim, theta, scale, numerics, share)

    def read_by_layers() -> dict[str, Any]:
        return {
            "intervals": {window or 0: interval(window) for window in windows},
            "tables": {rope: table(*rope) for rope in ropes},
            "deviations": dict(zip(sparsities, deviations_below(sparsities))),
        }

    return Context(
        runtime=runtime,
        pos_BT=pos_BT,
        **computed_once(read_by_layers),
        slots=slots,
        in_order=block_BT is None and not cfg.bidirectional,
        static_mask=static_mask,
        capture=capture,
        patch=patch,
    )
