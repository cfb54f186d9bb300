"""Products with weights whose arrays are spread over a mesh: no compiler can cut kernels."""

from dataclasses import replace
from typing import Any, Protocol

import jax

from gemma_jax.sharding import Partition
from gemma_jax.weights.contract import contracted


class Spread(Protocol):
    """A stand-in that knows its mesh, and multiplies on one device without it."""

    __dataclass_fields__: Any

    @property
    def shape(self) -> tuple[int, ...]: ...

    def array_dims(self, dims: str) -> Any: ...

    def contract(self, equation: str, x: jax.Array) -> jax.Array: ...


def product_on_mesh(equation: str, x: jax.Array, weight: Spread, partition: Partition) -> jax.Array:
    """`einsum(equation, x, weight)`: each device multiplies its rows with its part of the weight.

    All inputs are one axis, which goes by the first of their letters: parts of sums are added over
    its axes of the mesh. Axes that split rows of the batch as well (`fsdp`) split these: along them
    the weight is gathered.
    """
    letters, dims, result = equation.replace("->", ",").split(",")
    count = len(contracted(equation))
    free, first_input = letters[:-count], dims[-count]
    sizes = x.shape[: len(free)]
    rows = "".join(c if c == "B" else "_" for c in free)  # activations are split along no other
    rows = partition.dividing(rows, jax.ShapeDtypeStruct(sizes, x.dtype))
    local = replace(weight, partition=None)
    split = partition.dividing(
        local.array_dims(dims), local, dict(zip(dims, weight.shape, strict=True))
    )
    taken, kept = set(partition.axes(rows)), ""
    for letter in dict.fromkeys("".join(jax.tree.leaves(split))):  # those of outputs come first
        if not taken & (axes := set(partition.axes(letter))):
            taken, kept = taken | axes, kept + letter

    def only(names: str) -> str:
        return "".join(c if c in kept else "_" for c in names)

    summed = partition.axes(first_input) if first_input in kept else ()

    def product(x: jax.Array, part: Spread) -> jax.Array:
        y = part.contract(equation, x)
        return jax.lax.psum(y, summed) if summed else y

    inputs = first_input + "_" * (count - 1)
    return jax.shard_map(
        product,
        mesh=partition.mesh,
        in_specs=(
            partition.spec(rows + only(inputs), x.shape),
            jax.tree.map(lambda dims, a: partition.spec(only(dims), a.shape), split, local),
        ),
        out_specs=partition.spec(
            rows + only(result[len(free) :]), sizes + weight.shape[: len(weight.shape) - count]
        ),
        check_vma=False,
    )(x, local)
