"""Dimension letters -> mesh axes, from outside the model.

Layers know nothing of meshes. Weights, caches and activations are placed by their letters, and the
compiler carries the placement through the program (SPMD). Kernels cannot be cut by the compiler:
they run on each device's part, which the letters name as well (`Partition.run`).

Mesh axes have these names, and any of them may be absent:

    data       rows of a batch
    fsdp       weights along the model's width, gathered where they are used; rows of a batch too
    tensor     heads, feed-forward channels, vocabulary
    group      query heads that share a key/value head: splits what `tensor` does, but not caches
    sequence   key slots of global layers
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemma_jax.config import GemmaConfig

Rules = Mapping[str, tuple[str, ...]]

AXES = ("data", "fsdp", "sequence", "tensor", "group")
_CHANNELS = ("tensor", "group")

# Each device holds whole heads and whole channels; activations stay whole in D.
INFERENCE: Rules = {
    "B": ("data",),
    "N": _CHANNELS,
    "K": ("tensor",),
    "F": _CHANNELS,
    "V": _CHANNELS,
}
# The optimiser's state is as large as the weights, so these are split along D too.
TRAINING: Rules = {**INFERENCE, "B": ("data", "fsdp"), "D": ("fsdp",), "C": ("fsdp",)}
# Devices that share a head hold parts of its cache; other weights are split over them as well.
LONG_CONTEXT: Rules = {
    **INFERENCE,
    "S": ("sequence",),
    "F": (*_CHANNELS, "sequence"),
    "V": (*_CHANNELS, "sequence"),
}


@runtime_checkable
class HasLetters(Protocol):
    """A node of a tree that knows the letters of its arrays (a cache)."""

    def shardings(self, partition: "Partition") -> Any:
        """The node with a sharding in the place of each array."""
        ...


@runtime_checkable
class HasArrayDims(Protocol):
    """What stands in a Param in the place of an array (`weights.protocol.StandIn`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        ...

    def array_dims(self, dims: str) -> Any:
        """The same tree with the letters of its last axes in the place of each array."""
        ...


@dataclass(frozen=True)
class Partition:
    """A mesh, and the axes of it that each letter is split over.

    Attributes:
      mesh: Its axes must be of the type `Auto`, as `make_mesh` makes them.
      rules: Letter and axes, in pairs; axes that the mesh lacks are left out.
    """

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, mesh: Mesh, rules: Rules | None = None) -> "Partition":
        """The partition of a mesh by `rules`, by default those to run a model by.

        Raises:
          ValueError: An axis that no rule uses.
        """
        rules = serving_rules(mesh.axis_names) if rules is None else rules
        present = {x: tuple(a for a in axes if a in mesh.axis_names) for x, axes in rules.items()}
        if unused := set(mesh.axis_names) - {axis for axes in present.values() for axis in axes}:
            raise ValueError(
                f"no rule uses mesh axis {', '.join(map(repr, sorted(unused)))}; the rules know "
                f"{', '.join(sorted({axis for axes in rules.values() for axis in axes}))}"
            )
        return cls(mesh, tuple((letter, axes) for letter, axes in present.items() if axes))

    def spec(self, dims: str, shape: Sequence[int]) -> PartitionSpec:
        """Of an array whose last axes are `dims`; axes in front (stacking) are not split.

        Letters without a rule are whole on every device. So are key/value heads (`K`) that do not
        divide: they are few, and every query head needs its own. Of two letters with one axis the
        first is split.

        Raises:
          ValueError: A size is no multiple of its mesh axes.
        """
        rules = dict(self.rules)
        parts: list[tuple[str, ...] | None] = [None] * (len(shape) - len(dims))
        for letter, size in zip(dims, shape[len(parts) :]):
            used = {axis for part in parts for axis in part or ()}
            axes = tuple(axis for axis in rules.get(letter, ()) if axis not in used)
            count = math.prod(self.mesh.shape[axis] for axis in axes)
            if size % count:
                if letter != "K":
                    raise ValueError(
                        f"{letter}={size} cannot be split over mesh axis "
                        f"{' x '.join(map(repr, axes))} of size {count}; use sizes that divide it, "
                        "or drop the rule"
                    )
                axes = ()
            parts.append(axes or None)
        return PartitionSpec(*parts)

    def sharding(self, dims: str, shape: Sequence[int]) -> NamedSharding:
        """See `spec`."""
        return NamedSharding(self.mesh, self.spec(dims, shape))

    def placement(self, path: Any, dims: str, shape: Sequence[int]) -> NamedSharding:
        """`sharding`, as a checkpoint's loader asks for it."""
        return self.sharding(dims, shape)

    @property
    def whole(self) -> NamedSharding:
        """All of an array on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def shardings(self, tree: Any) -> Any:
        """A sharding for every array in models and caches; arrays outside of them stay whole."""

        def of(node: Any) -> Any:
            if isinstance(node, nnx.Param):
                return node.replace(self.param_shardings(node))
            if isinstance(node, HasLetters):
                return node.shardings(self)
            return self.whole

        return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, nnx.Param | HasLetters))

    def param_shardings(self, param: nnx.Param) -> Any:
        """Of its array, or of the arrays in the place of one; without letters, whole everywhere.

        Several arrays are split alike or not at all: a letter whose mesh axes divide its size but
        not the blocks or scales of it is whole on every device.
        """
        value, dims = param.get_value(), param.get_metadata().get("dims", "")
        if not isinstance(value, HasArrayDims):
            return jax.tree.map(lambda a: self.sharding(dims, a.shape), value)
        self.spec(dims, value.shape)  # refuses what does not divide
        sizes = dict(zip(dims, value.shape[len(value.shape) - len(dims) :]))
        letters = self.dividing(value.array_dims(dims), value, sizes)
        return jax.tree.map(lambda a, dims: self.sharding(dims, a.shape), value, letters)

    def dividing(self, letters: Any, arrays: Any, sizes: Mapping[str, int] = {}) -> Any:
        """The letters of some arrays, `_` in the place of those that do not divide all of them.

        Args:
          sizes: Of letters, which must divide too: an axis may hold several letters.
        """
        uneven = {letter for letter, size in sizes.items() if size % self._parts(letter)}
        for array, dims in zip(jax.tree.leaves(arrays), jax.tree.leaves(letters), strict=True):
            sizes = array.shape[array.ndim - len(dims) :]
            uneven |= {x for x, size in zip(dims, sizes) if size % self._parts(x)}
        whole = str.maketrans(dict.fromkeys(uneven, "_"))
        return jax.tree.map(lambda dims: dims.translate(whole), letters)

    def axes(self, letters: str) -> tuple[str, ...]:
        """The axes of the mesh that these letters are split over."""
        rules = dict(self.rules)
        return tuple(axis for letter in letters for axis in rules.get(letter, ()))

    def _parts(self, letter: str) -> int:
        """How many devices share the entries along a letter."""
        return math.prod(self.mesh.shape[axis] for axis in dict(self.rules).get(letter, ()))

    def place(self, tree: Any) -> Any:
        """The tree with its arrays where they belong."""
        return jax.device_put(tree, self.shardings(tree))

    def constrain(self, tree: Any) -> Any:
        """`place`, inside a program."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def constrain_activations(self, x: jax.Array, dims: str) -> jax.Array:
        """Splits along the rows of the batch alone: D is whole in activations."""
        sharding = self.sharding(dims.replace("D", "_"), x.shape)
        return jax.lax.with_sharding_constraint(x, sharding)

    def splits(self, letter: str) -> bool:
        """Whether arrays with this letter are split along it."""
        return self._parts(letter) > 1

    def index(self, letter: str) -> jax.Array:
        """Which part of those along a letter this device has; for use inside `run`."""
        axes = dict(self.rules).get(letter, ())
        return jax.lax.axis_index(axes) if axes else jnp.int32(0)

    def run(
        self,
        function: Callable,
        result: str,
        *operands: tuple[Any, Any],
        whole: str = "",
    ) -> jax.Array:
        """`function(*arrays)`, on every device for its part of them.

        Args:
          result: Letters of what comes out.
          *operands: Letters and array, in pairs; or a tree of letters and one of arrays.
          whole: Letters that are not split, whatever the rules.
        """
        letters, arrays = zip(*operands)
        sizes: dict[str, int] = {}
        jax.tree.map(lambda dims, a: sizes.update(zip(dims, a.shape, strict=True)), letters, arrays)

        def spec(dims: str) -> PartitionSpec:
            kept = "".join("_" if letter in whole else letter for letter in dims)
            return self.spec(kept, [sizes[letter] for letter in dims])

        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=jax.tree.map(spec, letters),
            out_specs=spec(result),
            check_vma=False,
        )(*arrays)


def make_mesh(cfg: GemmaConfig, devices: Sequence[jax.Device] | None = None, **sizes: int) -> Mesh:
    """A mesh of all devices, with axes out of `AXES` in that order.

    Where `tensor` has more devices than the model has key/value heads, the surplus becomes the axis
    `group`, so that caches are split as far as they can be.

    Args:
      devices: Default: all of them, whatever process they belong to.
      **sizes: Devices along each axis; one of them may be -1, for all that are left.

    Raises:
      ValueError: Unknown axes, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(cfg, len(devices), sizes)
    # Neighbours along an axis are neighbours in the machine, as far as its wires allow.
    array = mesh_utils.create_device_mesh(
        tuple(sizes.values()), devices, allow_split_physical_axes=True
    )
    return Mesh(array, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def mesh_sizes(cfg: GemmaConfig, count: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """The axes of `make_mesh` for so many devices, all sizes known."""
    sizes = dict(sizes)
    if unknown := set(sizes) - set(AXES):
        raise ValueError(f"unknown mesh axes {sorted(unknown)}; choose from {', '.join(AXES)}")
    if bad := {name: n for name, n in sizes.items() if n < 1 and n != -1}:
        raise ValueError(f"mesh axes must have at least one device, got {bad}")
    given = ", ".join(f"{name}={n}" for name, n in sizes.items())
    known = math.prod(n for n in sizes.values() if n != -1)
    open_axes = [name for name, n in sizes.items() if n == -1]
    if len(open_axes) > 1:
        raise ValueError(f"only one axis can take the devices left over, not {open_axes}")
    if open_axes and count % known == 0:
        sizes[open_axes[0]] = count // known
    if math.prod(sizes.values()) != count:
        wanted = f"{'a multiple of ' if open_axes else ''}{known} device{'s' * (known > 1)}"
        there = f"are {count}; give sizes that multiply to {count}"
        there = "is 1; leave the mesh out" if count == 1 else there
        raise ValueError(f"mesh {given} is for {wanted}, but there {there}")
    if "group" not in sizes and (tensor := sizes.get("tensor", 1)) > 1:
        sizes["tensor"] = math.gcd(tensor, *(cfg.heads_of(spec)[1] for spec in cfg.layers))
        if tensor > sizes["tensor"]:
            sizes["group"] = tensor // sizes["tensor"]
    return {axis: sizes[axis] for axis in AXES if axis in sizes}


def serving_rules(axes: Iterable[str]) -> Rules:
    """Rules to run a model by on a mesh with these axes."""
    return LONG_CONTEXT if "sequence" in axes else INFERENCE
