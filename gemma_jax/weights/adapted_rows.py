"""Weights with several adapters beside them, of which each row of a batch has one, or none."""

from dataclasses import dataclass, field, replace
from string import ascii_uppercase
from typing import Any

import jax
import jax.numpy as jnp

from gemma_jax.weights.adapted import Adapted, Factored
from gemma_jax.weights.contract import HIGHEST, contract, contracted
from gemma_jax.weights.gather import lookup
from gemma_jax.weights.protocol import Weight, array_dims


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptedRows(Factored):
    """Stands for one `Adapted` weight per row of the batch; see there.

    Of E adapters the first changes nothing.

    Attributes:
      base: The weight, `[*outputs, *inputs]`, once for all.
      a: `[E, R, *inputs]`.
      b: `[E, *outputs, R]`.
      scale: float32 `[E]`.
      chosen_B: int32; which adapter each row has. One alone is that of every row.
      names: Of all adapters but the first.
      gain: `[E, *outputs]`.
    """

    base: Weight
    a: jax.Array
    b: jax.Array
    scale: jax.Array
    chosen_B: jax.Array
    names: tuple[str, ...] = field(metadata={"static": True})
    gain: jax.Array | None = None

    def contract(self, equation: str, x: jax.Array) -> jax.Array:
        """See `StandIn`; the first axis of `x` is that of the rows."""
        if self.chosen_B.size == 1:
            return self._alone().contract(equation, x)
        self._check(len(x))
        letters, dims, result = equation.replace("->", ",").split(",")
        inputs = contracted(equation)
        outputs = dims.removesuffix(inputs)
        rows = result.removesuffix(outputs)
        rank = next(letter for letter in ascii_uppercase if letter not in equation)
        a, b, scale_B = (v[self.chosen_B] for v in (self.a, self.b, self.scale))

        def product(x: jax.Array, weights: jax.Array, of: str, to: str) -> jax.Array:
            letters, weights = f"{of}->{to}", weights.astype(x.dtype)
            return jnp.einsum(letters, x, weights, precision=HIGHEST)

        low = product(x, a, f"{letters},{letters[0]}{rank}{inputs}", rows + rank)
        low *= scale_B.astype(x.dtype).reshape(-1, *(1,) * (low.ndim - 1))
        y = contract(equation, x, self.base)
        y += product(low, b, f"{rows}{rank},{letters[0]}{outputs}{rank}", result)
        if self.gain is None:
            return y
        gain = self.gain[self.chosen_B].astype(y.dtype)
        between = (1,) * (y.ndim - gain.ndim)
        return y * gain.reshape(len(gain), *between, *gain.shape[1:])

    def rows(self, ids: jax.Array) -> jax.Array:
        """See `StandIn`; the first axis of `ids` is that of the rows."""
        if self.chosen_B.size == 1:
            return self._alone().rows(ids)
        self._check(len(ids))
        chosen = self.chosen_B.reshape(-1, *(1,) * (ids.ndim - 1))
        b, a, scale_B = self.b[chosen, ids], self.a[self.chosen_B], self.scale[self.chosen_B]
        change = jax.vmap(lambda b, a: jnp.tensordot(b, a, axes=1, precision=HIGHEST))(b, a)
        change *= scale_B.reshape(-1, *(1,) * (change.ndim - 1))
        rows = lookup(self.base, ids) + change
        if self.gain is None:
            return rows
        gain = self.gain[chosen, ids]
        return rows * gain.reshape(*gain.shape, *(1,) * self.num_inputs)

    def dense(self) -> jax.Array:
        """See `StandIn`; where one adapter is that of every row."""
        if self.chosen_B.size > 1:
            raise ValueError(
                "rows with different adapters have no weight in common: choose one of them first, "
                "as in choose_adapters(model, 'name')"
            )
        return self._alone().dense()

    def array_dims(self, dims: str) -> Any:
        """See `StandIn`; only the base and its axes are split."""
        outputs, inputs = dims[: -self.num_inputs], dims[-self.num_inputs :]
        letters = {"a": "__" + inputs, "b": f"_{outputs}_", "scale": "_", "chosen_B": "_"}
        gain = None if self.gain is None else "_" + outputs
        return replace(self, base=array_dims(self.base, dims), gain=gain, **letters)

    def _alone(self) -> Adapted:
        """The adapter of every row."""
        at = lambda v: None if v is None else v[self.chosen_B[0]]  # noqa: E731
        return Adapted(self.base, at(self.a), at(self.b), at(self.scale), at(self.gain))

    def _check(self, rows: int) -> None:
        if rows != self.chosen_B.size:
            raise ValueError(
                f"{self.chosen_B.size} adapters are chosen, but the batch has {rows} rows; choose "
                "one for each row, or one for all"
            )
