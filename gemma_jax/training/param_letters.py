"""What an optimizer must know of each trained tensor: which axes stack, and which are a matrix's.

A scanned model holds the weights of several layers in one array, with an axis in front that has no
letter. What a tensor's own axes are, the Param says (`dims`, and `inputs` for those that a product
sums over); adapters lie beside the weight that they change, at its path and one name more.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import nnx

from gemma_jax.weights.tree import ParamPath, dims_of, flat_params


class Letters(NamedTuple):
    """The axes of one tensor; those in front of `dims` stack several.

    Attributes:
      dims: Letters of its own axes.
      inputs: Those at the end of `dims` that are the columns of a matrix; `""` for a vector.
      is_map: Whether it is a linear map, and no table whose rows are looked up or the like.
    """

    dims: str
    inputs: str = ""
    is_map: bool = False

    @property
    def is_vector(self) -> bool:
        """Norm scales and biases, also those of many heads, whose letters are two."""
        return not self.inputs

    def stacked(self, ndim: int) -> int:
        """How many axes of an array stack."""
        return ndim - len(self.dims)

    def columns(self, ndim: int) -> int:
        """The first axis of an array that is part of a matrix's columns."""
        return ndim - len(self.inputs)


LettersOf = Callable[[ParamPath, int], Letters]  # of a path and its array's number of axes
FACTORS = ("a", "b")  # of an adapter: [..., r, inputs] and [..., outputs, r]


def letters_of(known: nnx.Module | Mapping[ParamPath, tuple[str, str]]) -> LettersOf:
    """Makes the function that says what the axes of a trained tensor are.

    Args:
      known: A model, or path -> `(dims, inputs)` of what its parameters are. A tensor beside a
        known one, at its path and one name more, is a factor of an adapter (`"a"` and `"b"`) or
        else a vector. Of any other the number of axes decides: under `blocks` the first one stacks;
        of two and more that remain the last is the input.
    """
    if isinstance(known, nnx.Module):
        params = flat_params(known).items()
        known = {p: (dims_of(v), v.get_metadata().get("inputs", "")) for p, v in params}
    return lambda path, ndim: _letters(dict(known), path, ndim)


def _letters(known: dict[ParamPath, tuple[str, str]], path: ParamPath, ndim: int) -> Letters:
    dims, inputs = known.get(path, ("", ""))
    if dims:
        return _of_model(path, dims, inputs)
    dims, inputs = known.get(path[:-1], ("", ""))
    if dims and inputs:
        if path[-1] not in FACTORS:
            return Letters(dims.removesuffix(inputs))
        if path[-1] == "a":
            return Letters("R" + inputs, inputs, is_map=True)
        return Letters(dims.removesuffix(inputs) + "R", "R", is_map=True)
    own = ndim - ("blocks" in path)
    return Letters("_" * own, "_" if own > 1 else "", is_map=own > 1)


def _of_model(path: ParamPath, dims: str, inputs: str) -> Letters:
    if inputs:
        return Letters(dims, inputs, is_map="V" not in dims)
    # Convolutions and position embeddings sum over nothing that a letter says: rows and the rest.
    return Letters(dims, "" if path[-1] == "bias" else dims[1:])


def name_of(path: ParamPath) -> str:
    """`blocks.0.0.attn.q.w`."""
    return ".".join(map(str, path))
