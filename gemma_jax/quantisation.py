"""Makes models whose weights are stored narrower than the arithmetic.

`quantise` makes one of a model; `store_weights` is the transform that `load` applies to each
parameter as it arrives. The model does not know: a Param holds a stand-in (`weights/protocol.py`)
in the place of an array.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.names import layer_names
from gemma_jax.sharding import Partition
from gemma_jax.storages import (
    ACTIVATIONS,
    MADE_STORAGES,
    Activations,
    StorageRules,
    WeightStorage,
    is_quantised,
    one_of,
    storage_bits,
    storage_group,
)
from gemma_jax.weights.adapted import Adapted
from gemma_jax.weights.adapted_rows import AdaptedRows
from gemma_jax.weights.off_device import OffDeviceTable
from gemma_jax.weights.protocol import StandIn, Weight, array_bytes, dense
from gemma_jax.weights.quantized import QuantizedWeight
from gemma_jax.weights.stored import StoredWeight
from gemma_jax.weights.tree import ParamPath, flat_params, with_params
from gemma_kernels.quantized_matmul import QuantizedMatrix

Store = Callable[[ParamPath, jax.Array], Weight]

# What groups do not suit, if nobody says otherwise: matrices of towers, some of which no group
# divides, and Gemma 3n's mixing of four streams, which is tiny.
SCALE_BYTES = 4
PER_CHANNEL = ("vision.*", "audio.*", "*.altup.*")


def quantise(
    model: Gemma,
    storage: WeightStorage | StorageRules,
    *,
    activations: Activations = "float",
) -> Gemma:
    """Makes a model with its matrices stored narrower; arithmetic stays what it was.

    Args:
      storage: Of all matrices, by a name as in `LoadOptions.weights`; or patterns of their names
        (`embed.table`, `blocks.3.attn.q.w`, `*.ffn.*`) with the storage of each. The first pattern
        that fits decides, and what none fits stays as it is, as vectors always do. One name for all
        with a scale per group means `"int8"` for `vision.*`, `audio.*` and `*.altup.*`.
      activations: `"int8"` rounds activations as well, in products with quantised matrices.

    Raises:
      ValueError: An unknown storage; a pattern that decides on no matrix; a matrix whose inputs
        its group does not divide.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits", modalities=("text",))
      >>> small = gj.quantise(model, {"embed.*": "int8", "*": "int4:32"})
      >>> small.embed.table.get_value().matrix.bits, small.blocks[0][0].ffn.up.w.get_value().nbytes
      (8, 10240)
    """
    store = store_weights(storage, activations)(model)

    def stored(path: ParamPath, value: Weight) -> Weight:
        if isinstance(value, Adapted | AdaptedRows):  # factors stay as they are
            return replace(value, base=stored(path, value.base))
        return value if isinstance(value, OffDeviceTable) else store(path, dense(value))

    params = flat_params(model)
    return with_params(model, {path: stored(path, p.get_value()) for path, p in params.items()})


@dataclass(frozen=True)
class RoundingError:
    """Says what storing a matrix narrower loses.

    Attributes:
      storage: Of the matrix.
      relative: Root mean square of the error, over that of the entries.
      largest: Error of an entry.
      bits_per_weight: With scales.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits", modalities=("text",))
      >>> gj.quantisation_errors(model, {"embed.*": "bfloat16"})["embed.table"].bits_per_weight
      16.0
    """

    storage: WeightStorage
    relative: float
    largest: float
    bits_per_weight: float


def quantisation_errors(
    model: Gemma, storage: WeightStorage | StorageRules
) -> dict[str, RoundingError]:
    """Measures what `quantise(model, storage)` would lose, matrix by matrix and layer by layer.

    Args:
      model: With weights as exact as there are; each is rounded by itself, and forgotten.
      storage: As for `quantise`, which raises the same errors.

    Returns:
      Name of a parameter in one layer (`blocks.3.ffn.up.w`) -> its error. Matrices that stay as
      they are do not appear.

    Examples:
      >>> import gemma_jax as gj
      >>> model = gj.load_model("checkpoints/digits", modalities=("text",))
      >>> errors = gj.quantisation_errors(model, {"embed.*": "int8", "*": "int4:32"})
      >>> error = errors["blocks.2.ffn.up.w"]
      >>> error.storage, error.bits_per_weight, round(error.relative, 1)
      ('int4:32', 5.0, 0.1)
    """
    params, found = flat_params(model), {}
    for path, kind in storages_of(model, storage).items():
        value = params[path].get_value()
        if isinstance(value, OffDeviceTable):
            continue
        array = dense(value)
        stored = _stored(params[path], array, kind, "float", model)
        bits = 8 * (stored.nbytes if isinstance(stored, StandIn) else array_bytes(stored))
        for name, row in layer_names(path, model):
            whole, part = (x if row is None else _layer(x, row) for x in (array, stored))
            relative, largest = _errors(whole, part)
            found[name] = RoundingError(kind, float(relative), float(largest), bits / array.size)
    return found


def _layer(weight: Weight, row: int) -> Weight:
    return jax.tree.map(lambda a: a[row], weight)


@jax.jit
def _errors(array: jax.Array, stored: Weight) -> tuple[jax.Array, jax.Array]:
    wide = array.astype(jnp.float32)
    error = dense(stored).astype(jnp.float32) - wide
    size = jnp.sqrt(jnp.mean(jnp.square(wide)))
    relative = jnp.sqrt(jnp.mean(jnp.square(error))) / jnp.where(size == 0, 1, size)
    return relative, jnp.max(jnp.abs(error))


def store_weights(
    storage: WeightStorage | StorageRules, activations: Activations = "float"
) -> Callable[[Gemma], Store]:
    """A function of a model, abstract or not, that returns how one of its parameters is stored.

    Vectors (norm scales) keep their dtype. Arguments and errors are those of `quantise`.
    """
    rules = storage if isinstance(storage, Mapping) else {"*": storage}
    for name in rules.values():
        if name not in MADE_STORAGES:
            raise ValueError(f"storage={name!r} must be {one_of(MADE_STORAGES)}")
    if activations not in ACTIVATIONS:
        raise ValueError(f"{activations=} must be {one_of(ACTIVATIONS)}")

    def of(model: Gemma) -> Store:
        chosen, params = storages_of(model, storage), flat_params(model)

        def store(path: ParamPath, array: jax.Array) -> Weight:
            if path not in chosen:
                return array
            return _stored(params[path], array, chosen[path], activations, model)

        return store

    return of


def keep_matrix(
    activations: Activations = "float", partition: Partition | None = None
) -> Callable[[nnx.Param, QuantizedMatrix], Weight]:
    """A function `(param, matrix) -> weight` for what a file holds in quantised blocks.

    The matrix is `[..., O, I]`, in the order of the entries of the parameter, in either layout; it
    keeps its codes and scales.
    """

    def keep(param: nnx.Param, matrix: QuantizedMatrix) -> Weight:
        metadata, shape = param.get_metadata(), tuple(param.get_value().shape)
        stacked = len(shape) - len(metadata["dims"])
        # Files hold rows of all layers' vectors: of the per-layer table two axes are inputs.
        sizes = (math.prod(shape[-n:]) for n in range(1, len(shape)))
        count = 1 + list(sizes).index(matrix.shape[-1])
        matrix = jax.tree.map(jnp.asarray, matrix)
        weight = QuantizedWeight.of(matrix, shape, count, activations, num_stacked=stacked)
        weight = weight.laid_out(looked_up=_is_looked_up(param), num_stacked=stacked)
        if partition is None:
            return weight
        weight = jax.device_put(weight, partition.param_shardings(param.replace(weight)))
        return replace(weight, partition=partition)

    return keep


def storages_of(
    model: Gemma, storage: WeightStorage | StorageRules
) -> dict[ParamPath, WeightStorage]:
    """The storage of every matrix that is to have another; see `quantise`."""
    for_all = not isinstance(storage, Mapping)
    rules = rules_for_all(storage) if for_all else dict(storage)
    unused, chosen, problems = set(rules), {}, []
    matrices = {path: p for path, p in flat_params(model).items() if _num_inputs(p)}
    for path, param in matrices.items():
        names = [name for name, _ in layer_names(path, model)]
        fitting = [next((r for r in rules if fnmatchcase(name, r)), None) for name in names]
        unused -= set(fitting)
        found = {rules[rule] if rule else None for rule in fitting}
        if len(found) > 1:
            problems.append(
                f"{names[0]} and {names[-1]} lie in one array, and cannot be stored as "
                f'{" and ".join(sorted(map(str, found)))}; load the model with layout="unrolled"'
            )
        elif (kind := found.pop()) is not None:
            chosen[path] = kind
            problems += _indivisible(names[0], param, kind)
    if unused and not for_all:
        known = ", ".join(next(layer_names(path, model))[0] for path in list(matrices)[:4])
        problems += [
            f"the pattern {rule!r} decides on no matrix: none is called so, or an earlier pattern "
            f"fits it too; names are such as {known}"
            for rule in rules
            if rule in unused
        ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return chosen


def weight_bytes(model: Gemma, storage: WeightStorage | StorageRules, bits: int = 16) -> int:
    """Bytes of a model, abstract or not, whose matrices are stored so; see `bytes_by_param`."""
    return sum(bytes_by_param(model, storage, bits).values())


def bytes_by_param(
    model: Gemma, storage: WeightStorage | StorageRules, bits: int = 16
) -> dict[ParamPath, int]:
    """Bytes of every parameter of a model, abstract or not, whose matrices are stored so.

    Args:
      bits: Of an entry of all else.

    Raises:
      ValueError: As `quantise` does.
    """
    chosen, sizes = storages_of(model, storage), {}
    for path, param in flat_params(model).items():
        size, kind = math.prod(param.get_value().shape), chosen.get(path)
        sizes[path] = size * (storage_bits(kind) if kind else bits) // 8
        if kind is not None and is_quantised(kind):
            inputs = math.prod(param.get_value().shape[-_num_inputs(param) :])
            sizes[path] += size // (storage_group(kind) or inputs) * SCALE_BYTES
    return sizes


def rules_for_all(storage: WeightStorage) -> StorageRules:
    """What one name for all matrices stands for."""
    in_groups = is_quantised(storage) and storage != "int8"
    return (dict.fromkeys(PER_CHANNEL, "int8") if in_groups else {}) | {"*": storage}


def _indivisible(name: str, param: nnx.Param, storage: WeightStorage) -> list[str]:
    group = storage_group(storage) if is_quantised(storage) else None
    inputs = math.prod(param.get_value().shape[-_num_inputs(param) :])
    if group is None or inputs % group == 0:
        return []
    return [
        f"{name} has {inputs} inputs, which groups of {group} ({storage}) do not divide; give it "
        f'another storage, as in {{"{name}": "int8", "*": "{storage}"}}'
    ]


def _num_inputs(param: nnx.Param) -> int:
    return len(param.get_metadata().get("inputs", ""))


def _stored(
    param: nnx.Param,
    array: jax.Array,
    storage: WeightStorage,
    activations: Activations,
    model: Gemma,
) -> Weight:
    if storage == "float32":
        return array
    if storage == "bfloat16":
        return array if array.dtype == jnp.bfloat16 else _as_bits(array)
    form = (_num_inputs(param), storage_bits(storage), storage_group(storage), activations)
    form += (_is_looked_up(param), array.ndim - len(param.get_metadata()["dims"]))
    partition = model.runtime.partition
    if partition is None:
        return _rounded(array, *form)
    shapes = jax.eval_shape(lambda a: _rounded(a, *form, where=partition.whole), array)
    where = partition.param_shardings(param.replace(shapes))
    return replace(_rounded(array, *form, where=where), partition=partition)


def _is_looked_up(param: nnx.Param) -> bool:
    """Whether rows of it are read one by one, as those of a vocabulary."""
    return param.get_metadata()["dims"].startswith("V")


@partial(jax.jit, static_argnums=range(1, 7), static_argnames="where")
def _rounded(
    array, num_inputs, bits, group, activations, looked_up, num_stacked, *, where=None
) -> QuantizedWeight:
    weight = QuantizedWeight.rounded(
        array,
        num_inputs,
        bits,
        group,
        activations,
        in_pieces=where is None,
        looked_up=looked_up,
        num_stacked=num_stacked,
    )
    return weight if where is None else jax.lax.with_sharding_constraint(weight, where)


@jax.jit
def _as_bits(array: jax.Array) -> StoredWeight:
    return StoredWeight(jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16))
