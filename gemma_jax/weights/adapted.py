"""Weights with low-rank adapters beside them: LoRA, and DoRA's gain on its outputs.

Whatever the weight is: over one of whole numbers, or over the blocks of a file, this is QLoRA.
Layers of a stack may have adapters of unlike ranks, or none: factors of zeros, whose gradients are
zero as well, so that they stay what they are.

Local letters: O outputs; I inputs, each all of them together; R low rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import ascii_uppercase
from typing import Any, Self

import jax
import jax.numpy as jnp

from gemma_jax.weights.contract import HIGHEST, contract, contracted
from gemma_jax.weights.gather import lookup
from gemma_jax.weights.protocol import Index, StandIn, Weight, array_dims, dense, take


class Factored(StandIn):
    """A weight with low-rank factors beside it, whose last axes keep outputs and inputs apart.

    Subclasses have the fields `base`, `a`, `b`, `scale` and `gain`; whatever axes `scale` has stand
    in front of those of the factors.
    """

    base: Weight
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    gain: jax.Array | None

    @property
    def num_inputs(self) -> int:
        """How many of the last axes are inputs."""
        return self.a.ndim - 1 - self.scale.ndim

    @property
    def shape(self) -> tuple[int, ...]:
        """See `StandIn`."""
        return tuple(self.base.shape)

    def take(self, axis: int, index: Index) -> Self:
        """See `StandIn`. Along inputs the gain stays: that of the weight it was trained with."""
        base, count = take(self.base, axis, index), self.num_inputs
        if axis >= -count:
            return replace(self, base=base, a=take(self.a, axis, index))
        gain = None if self.gain is None else take(self.gain, axis + count, index)
        return replace(self, base=base, b=take(self.b, axis + count - 1, index), gain=gain)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapted(Factored):
    """Stands for `gain * (base + scale * b a)`, with the axes of inputs and outputs kept apart.

    Which axes are inputs say the factors: of a table of rows, all but the first.

    Attributes:
      base: The weight, `[*outputs, *inputs]`.
      a: `[R, *inputs]`.
      b: `[*outputs, R]`.
      scale: float32; of each layer, in a stack. 0 where a layer has no adapter.
      gain: `[*outputs]`: DoRA's magnitudes over the norms of rows of `base + scale * b a`.
    """

    base: Weight
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    gain: jax.Array | None = None

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        """See `StandIn`; the adapter is never multiplied out."""
        letters, dims, result = equation.replace("->", ",").split(",")
        inputs = contracted(equation)
        outputs = dims.removesuffix(inputs)
        rows = result.removesuffix(outputs)
        rank = next(letter for letter in ascii_uppercase if letter not in equation)
        low = contract(f"{letters},{rank}{inputs}->{rows}{rank}", x, self.a)
        low *= self.scale.astype(x.dtype)
        y = contract(equation, x, self.base)
        y += contract(f"{rows}{rank},{outputs}{rank}->{result}", low, self.b)
        return y if self.gain is None else y * self.gain.astype(y.dtype)

    def rows(self, ids: jax.Array) -> jax.Array:
        """See `StandIn`."""
        change = jnp.tensordot(lookup(self.b, ids), self.a, axes=1, precision=HIGHEST)
        rows = lookup(self.base, ids) + self.scale * change
        return rows if self.gain is None else rows * self._behind(lookup(self.gain, ids))

    def dense(self) -> jax.Array:
        """The merged array, summed in float32, in the dtype of the base."""
        base, stacked, rank = dense(self.base), self.scale.shape, self.b.shape[-1]
        b_OR = self.b.reshape(*stacked, -1, rank).astype(jnp.float32)
        a_RI = self.a.reshape(*stacked, rank, -1).astype(jnp.float32)
        change = jnp.matmul(b_OR, a_RI, precision=HIGHEST) * self.scale[..., None, None]
        whole = base.astype(jnp.float32) + change.reshape(self.shape)
        if self.gain is not None:
            whole *= self._behind(self.gain)
        return whole.astype(base.dtype)

    def array_dims(self, dims: str) -> Any:
        """See `StandIn`; ranks are never split."""
        outputs, inputs = dims[: -self.num_inputs], dims[-self.num_inputs :]
        letters = {"base": array_dims(self.base, dims), "a": "_" + inputs, "b": outputs + "_"}
        return replace(self, **letters, scale="", gain=None if self.gain is None else outputs)

    def _behind(self, outputs: jax.Array) -> jax.Array:
        """`[..., *outputs]` as it multiplies `[..., *outputs, *inputs]`."""
        return outputs.reshape(*outputs.shape, *(1,) * self.num_inputs)


def row_norms(weight: Adapted) -> jax.Array:
    """The l2 norms of the rows of `base + scale * b a`, float32 `[*outputs]`; without gradients.

    Of a stack, layer by layer: no more than one layer of the merged weight exists at a time.
    """
    weight = jax.tree.map(jax.lax.stop_gradient, replace(weight, gain=None))
    if weight.scale.ndim == 0:
        inputs = tuple(range(-weight.num_inputs, 0))
        whole = dense(weight.base).astype(jnp.float32)
        whole = replace(weight, base=whole).dense()
        return jnp.sqrt(jnp.sum(jnp.square(whole), axis=inputs))
    if len(weight.scale) == 1:
        return row_norms(jax.tree.map(lambda a: a[0], weight))[None]
    return jax.lax.map(row_norms, weight)


def with_magnitudes(weight: Adapted, magnitude: jax.Array) -> Adapted:
    """The weight with rows of these norms (DoRA), `[*outputs]`; layers without adapters stay.

    Norms have no gradient, as in the paper (Liu et al., "DoRA", 2024, section 4.3).
    """
    norms = row_norms(weight)
    adapted = (weight.scale != 0).reshape(
        *weight.scale.shape, *(1,) * (norms.ndim - weight.scale.ndim)
    )
    # Norms of rows of zeros divide nothing.
    norms = jnp.where(norms == 0, 1, norms)
    return replace(weight, gain=jnp.where(adapted, magnitude / norms, 1))


def alike(rows: Sequence[Weight]) -> list[Weight]:
    """Weights of one shape in forms that can be stacked: all with adapters of one rank, or none."""
    adapted = [row for row in rows if isinstance(row, Adapted)]
    if not adapted:
        return list(rows)
    first, rank = adapted[0], max(row.b.shape[-1] for row in adapted)
    with_gain = any(row.gain is not None for row in adapted)

    def one(row: Weight) -> Adapted:
        if not isinstance(row, Adapted):
            zeros = jax.tree.map(jnp.zeros_like, (first.a, first.b, first.scale))
            row = Adapted(row, *zeros)
        missing, axis = rank - row.b.shape[-1], row.scale.ndim
        a = jnp.pad(row.a, [(0, missing * (i == axis)) for i in range(row.a.ndim)])
        b = jnp.pad(row.b, [(0, missing * (i == row.b.ndim - 1)) for i in range(row.b.ndim)])
        gain = row.gain
        if with_gain and gain is None:
            gain = jnp.ones(row.b.shape[:-1], jnp.float32)
        return replace(row, a=a, b=b, gain=gain)

    return [one(row) for row in rows]
