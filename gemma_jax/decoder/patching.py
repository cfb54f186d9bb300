"""Other values in the place of intermediate results, by the names under which these are captured.

A patch reads as an assignment to what a pass captures:

    patch={name: (layer, position, value)}    captured[name][layer][..., position, :] = value
    patch={name: function}                    captured[name][layer] = function(layer, ...)

and all that is computed afterwards reads the new value, `captured` itself included. Numbers of
layers and positions are arrays of the program: one compiled pass serves them all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

# Name -> dimensions; of what layers have, of one of them. Stacks of layers have L in front, but
# `per_layer_inputs`, which are [B, T, L, P]. Gemma 3n has streams: A in front of BTD.
DIMS = {
    "embeddings": "BTD",
    "inputs_embeds": "BTD",
    "per_layer_inputs": "BTP",
    "layer_outputs": "ABTD",
    "attention_weights": "BNTS",
    "attention_outputs": "BTD",
    "ffn_outputs": "BTD",
    "final_norm": "BTD",
    "laurel": "BTD",
    "altup_predictions": "ABTD",
    "altup_mixtures": "BTAA",
    "altup_gains": "BTA",
    "per_layer_gates": "BTP",
    "per_layer_outputs": "BTD",
    "sparsity_masks": "BTF",
}
OF_NO_LAYER = ("embeddings", "inputs_embeds", "final_norm")
READ_OFF = ("sparsity_masks",)  # nothing is computed from them
PATCHES = tuple(name for name in DIMS if name not in READ_OFF)
PLAIN_ATTENTION = ("auto", "xla", "reference")  # implementations whose weights may be patched

Index = int | slice | Sequence[int] | jax.typing.ArrayLike
Change = tuple[Index | None, Index, jax.typing.ArrayLike] | Callable[..., jax.Array]
Patch = Mapping[str, Change | list[Change]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Assignment:
    """A value for some tokens in some layers.

    Attributes:
      layers: int32, which; `None` for what belongs to none.
      positions: int32, which tokens of each row; `None` for all.
      value: Fits the part of the result that it replaces, as NumPy broadcasts.
      single: Whether one position was given, for which the value has no axis.
    """

    layers: jax.Array | None
    positions: jax.Array | None
    value: jax.Array
    single: bool = field(metadata={"static": True})


Patches = dict[str, tuple[Assignment | Partial, ...]]


def read_patch(patch: Patch | None, depth: int, tokens: int) -> Patches:
    """What to change, with every number of a layer and a position in range where it is known.

    Args:
      depth: Of the model, in layers.
      tokens: New ones per row.

    Raises:
      ValueError: Names, layers or positions that there are not, or something else than a change.
    """
    if patch is None:
        return {}
    if not isinstance(patch, Mapping):
        raise ValueError(f"patch must be a dict by name, got {type(patch).__name__}")
    if unknown := sorted(set(patch) - set(PATCHES)):
        why = "; sparsity_masks are read off, not used" if set(unknown) & set(READ_OFF) else ""
        raise ValueError(f"cannot patch {unknown}; choose from {', '.join(PATCHES)}{why}")
    return {
        name: tuple(
            _read_change(name, change, depth, tokens)
            for change in (given if isinstance(given, list) else [given])
        )
        for name, given in patch.items()
    }


def patched(
    changes: tuple[Assignment | Partial, ...], name: str, x: jax.Array, layer: jax.Array | None
) -> jax.Array:
    """A result of a layer, or of none, after the changes in their order."""
    for change in changes:
        if isinstance(change, Assignment):
            x = _assign(change, name, x, layer)
        else:
            x = _call(change, name, x, layer)
    return x


def patched_layers(
    changes: tuple[Assignment | Partial, ...], name: str, x: jax.Array, axis: int
) -> jax.Array:
    """Results of all layers, which lie along an axis."""
    one = lambda layer, x: patched(changes, name, x, layer)  # noqa: E731
    layers = jnp.arange(x.shape[axis], dtype=jnp.int32)
    return jax.vmap(one, in_axes=(0, axis), out_axes=axis)(layers, x)


def _read_change(name: str, change: Any, depth: int, tokens: int) -> Assignment | Partial:
    if callable(change):
        return change if isinstance(change, Partial) else Partial(change)
    if not isinstance(change, tuple) or len(change) != 3:
        got = f"{len(change)} entries" if isinstance(change, tuple) else type(change).__name__
        raise ValueError(
            f"patch of {name}: expected (layer, position, value), a function, or a list of such; "
            f"got {got}"
        )
    layer, position, value = change
    if (layer is None) != (name in OF_NO_LAYER):
        needed = "None, for it belongs to no layer" if layer is not None else "given"
        raise ValueError(f"patch of {name}: the layer must be {needed}; got {layer!r}")
    layers = None if layer is None else _indices(name, "layer", layer, depth)[0]
    everywhere = isinstance(position, slice) and position == slice(None)
    positions, single = (
        (None, False) if everywhere else _indices(name, "position", position, tokens)
    )
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"patch of {name}: the value is no array: {error}") from None
    return Assignment(layers, positions, array, single)


def _indices(name: str, what: str, given: Any, size: int) -> tuple[jax.Array | np.ndarray, bool]:
    """int32, along one axis, and whether a single one was given."""
    if isinstance(given, slice):
        given = np.arange(size)[given]
    if isinstance(given, Sequence) and any(isinstance(i, jax.core.Tracer) for i in given):
        given = jnp.stack([jnp.asarray(i) for i in given])
    known = not isinstance(given, jax.core.Tracer)
    array = np.asarray(given) if known else given
    if array.ndim > 1 or array.size == 0 or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"patch of {name}: the {what} must be an integer, several or a slice of at least one; "
            f"got {given!r}"
        )
    flat = array.reshape(-1)
    if known:
        if outside := [int(i) for i in flat if not -size <= i < size]:
            raise ValueError(
                f"patch of {name}: {what} {outside[0]} is outside [-{size}, {size}): there are "
                f"{size} {'layers' if what == 'layer' else 'tokens in a row'}"
            )
        if len(set((flat % size).tolist())) < len(flat):
            raise ValueError(f"patch of {name}: a {what} is given twice in {given!r}")
        return (flat % size).astype(np.int32), array.ndim == 0
    return jnp.where(flat < 0, flat + size, flat).astype(jnp.int32), array.ndim == 0


def _assign(change: Assignment, name: str, x: jax.Array, layer: jax.Array | None) -> jax.Array:
    dims = DIMS[name][-x.ndim :]
    after = len(dims) - dims.index("T") - 1  # axes behind that of tokens
    value, positions, layers = change.value, change.positions, change.layers
    if change.single and value.ndim >= after:
        value = jnp.expand_dims(value, -after - 1)
    count = x.shape[-after - 1] if positions is None else len(positions)
    shape = (*x.shape[: -after - 1], count, *x.shape[x.ndim - after :])
    if layers is not None:
        shape = (len(layers), *shape)
    try:
        value = jnp.broadcast_to(value, shape).astype(x.dtype)
    except ValueError:
        _refuse_shape(change, name, dims, shape)
    hit = None
    if layers is not None:
        hit = layers == layer
        value = value[jnp.argmax(hit)]
    if positions is not None:
        value = x.at[(..., positions, *[slice(None)] * after)].set(value)
    return value if hit is None else jnp.where(hit.any(), value, x)


def _refuse_shape(change: Assignment, name: str, dims: str, shape: tuple[int, ...]) -> None:
    sizes = list(zip(dims, shape[-len(dims) :]))
    if change.layers is not None and shape[0] > 1:
        sizes = [("L", shape[0]), *sizes]
    if change.single:
        sizes = [(letter, size) for letter, size in sizes if letter != "T"]
    letters, numbers = zip(*sizes)
    raise ValueError(
        f"patch of {name}: a value of shape {list(change.value.shape)} does not fit "
        f"[{', '.join(letters)}] = {list(numbers)}"
    ) from None


def _call(function: Partial, name: str, x: jax.Array, layer: jax.Array | None) -> jax.Array:
    value = function(layer, x)
    if getattr(value, "shape", None) != x.shape:
        got = getattr(value, "shape", None)
        got = type(value).__name__ if got is None else f"one of shape {list(got)}"
        raise ValueError(
            f"patch of {name}: the function must return an array of shape {list(x.shape)}; "
            f"got {got}"
        )
    return value.astype(x.dtype)
