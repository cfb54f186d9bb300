"""Puts adapters into a model, and takes them out again: by name, layer by layer.

A model with adapters holds `Adapted` stand-ins (`weights/adapted.py`) and is used as any other.
Where they come from is not known here: `training/lora.py` begins them, a PEFT folder holds them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.names import layer_names
from gemma_jax.distributed import fetched
from gemma_jax.weights.adapted import Adapted, row_norms, with_magnitudes
from gemma_jax.weights.protocol import Weight, dense
from gemma_jax.weights.tree import flat_params, with_attributes, with_params

TABLE, HEAD = "embed.table", "embed.head"


@dataclass(frozen=True)
class Factors:
    """Holds the adapter of one matrix of one layer.

    Attributes:
      a: `[R, *inputs]`.
      b: `[*outputs, R]`.
      scale: Of their product.
      magnitude: `[*outputs]`, DoRA's; `None` without.
    """

    a: jax.Array | np.ndarray
    b: jax.Array | np.ndarray
    scale: float
    magnitude: jax.Array | np.ndarray | None = None

    @property
    def rank(self) -> int:
        """Of both."""
        return self.b.shape[-1]


@dataclass(frozen=True)
class Adapter:
    """Holds all that an adapter changes in a model.

    Attributes:
      factors: Name in one layer (`blocks.3.attn.q.w`) -> factors.
      whole: Name -> array in the place of the parameter's.
      own_head: What it changes in the embedding table is not for the head: a model whose head is
        that table gets a head of its own, which stays as it was.
    """

    factors: Mapping[str, Factors]
    whole: Mapping[str, jax.Array | np.ndarray] = field(default_factory=dict)
    own_head: bool = False


def adapt(model: Gemma, adapter: Adapter) -> Gemma:
    """Makes a model with an adapter beside its weights; it shares all arrays.

    Raises:
      ValueError: A name that the model does not have; a weight that has an adapter already.
    """
    factors, whole = adapter.factors, adapter.whole
    if adapter.own_head or HEAD in factors or HEAD in whole:
        model = untied(model)
    new, left = {}, factors.keys() | whole.keys()
    for path, param in flat_params(model).items():
        named = list(layer_names(path, model))
        names = [name for name, _ in named]
        left -= set(names)
        value = param.get_value()
        if any(name in whole for name in names):
            value = new[path] = _placed(model, param, _with_whole(value, named, whole))
        if any(name in factors for name in names):
            if isinstance(value, Adapted):
                raise ValueError(
                    f"{names[0]} has an adapter already; merge it first, or hold several side by "
                    "side with `with_adapters`"
                )
            given = [factors.get(name) for name in names]
            new[path] = _placed(model, param, _adapted(value, given, named[0][1] is not None))
    if left:
        raise ValueError(f"the model has no {', '.join(sorted(left)[:4])} to adapt")
    return with_params(model, new)


def _with_whole(value: Weight, named: list[tuple[str, int | None]], whole: Mapping) -> jax.Array:
    dtype = value.dtype if isinstance(value, jax.Array) else jnp.float32
    if named[0][1] is None:
        return jnp.asarray(whole[named[0][0]], dtype)
    rows = [
        whole[name] if name in whole else dense(jax.tree.map(lambda a, row=row: a[row], value))
        for name, row in named
    ]
    return jnp.stack([jnp.asarray(row, dtype) for row in rows])


def _adapted(base: Weight, given: list[Factors | None], stacked: bool) -> Weight:
    """One weight, or a stack of them, with an adapter for each that has one."""
    there = [one for one in given if one is not None]
    like, rank = there[0], max(one.rank for one in there)
    rows = [_padded(one, like, rank) for one in given]
    arrays = jax.tree.map(lambda *layers: jnp.stack(layers), *rows) if stacked else rows[0]
    magnitude = arrays.pop("magnitude", None)
    weight = Adapted(base, **arrays)
    return weight if magnitude is None else with_magnitudes(weight, magnitude)


def _padded(factors: Factors | None, like: Factors, rank: int) -> dict[str, jax.Array]:
    """The arrays of an adapter of this rank: zeros where it has less, or there is none."""
    one = factors or replace(like, scale=0.0)
    a, b = jnp.asarray(one.a, jnp.float32), jnp.asarray(one.b, jnp.float32)
    more = (0, rank - one.rank)
    a = jnp.pad(a, [more, *[(0, 0)] * (a.ndim - 1)])
    b = jnp.pad(b, [*[(0, 0)] * (b.ndim - 1), more])
    if factors is None:
        a, b = jnp.zeros_like(a), jnp.zeros_like(b)
    arrays = {"a": a, "b": b, "scale": jnp.float32(one.scale)}
    if one.magnitude is not None:
        arrays["magnitude"] = jnp.asarray(one.magnitude, jnp.float32)
    return arrays


def _placed(model: Gemma, param: nnx.Param, value: Weight) -> Weight:
    """The factors beside the parts of the weight, on a mesh."""
    if (partition := model.runtime.partition) is None:
        return value
    return jax.device_put(value, partition.param_shardings(param.replace(value)))


def untied(model: Gemma) -> Gemma:
    """The model with a head of its own, which is the embedding table's array once more."""
    if model.embed.head is not None:
        return model
    model = with_attributes(model, cfg=replace(model.cfg, tied_head=False))
    table = model.embed.table
    model.embed.head = nnx.data(table.replace(table.get_value()))
    return model


def is_adapted(model: Gemma) -> bool:
    """Whether a model has adapters."""
    return any(isinstance(p.get_value(), Adapted) for p in flat_params(model).values())


def without_adapters(model: Gemma) -> Gemma:
    """The model as it was before it had adapters; what was trained whole stays as it is."""
    values = {path: param.get_value() for path, param in flat_params(model).items()}
    return with_params(model, {p: v.base for p, v in values.items() if isinstance(v, Adapted)})


def factors_of(model: Gemma) -> dict[str, Factors]:
    """Name of a matrix in one layer -> its adapter, in order; see `adapt`.

    What was only put there to fill a stack is left out.
    """
    found = {}
    for path, param in flat_params(model).items():
        if isinstance(value := param.get_value(), Adapted):
            magnitude = None if value.gain is None else value.gain * row_norms(value)
            for name, row in layer_names(path, model):
                one = _factors(value, magnitude, row)
                found |= {} if one is None else {name: one}
    return found


def _factors(value: Adapted, magnitude: jax.Array | None, row: int | None) -> Factors | None:
    a, b, scale, m = jax.tree.map(
        lambda x: fetched(x if row is None else x[row]),
        (value.a, value.b, value.scale, magnitude),
    )
    used = np.any(a.reshape(len(a), -1) != 0, axis=1) | np.any(b.reshape(-1, len(a)) != 0, axis=0)
    rank = int(np.max(np.nonzero(used)[0], initial=-1)) + 1
    if scale == 0 or rank == 0:
        return None
    return Factors(a[:rank], b[..., :rank], float(scale), m)


def merge(model: Gemma) -> Gemma:
    """Makes a plain model of one with adapters: each is added to its weight, once.

    An embedding whose adapter is not the head's leaves the head as it is: then the new model has a
    head of its own (`cfg.tied_head` is false). Sums are made in float32; the result has the dtype
    of the weight, or float32 where that is stored in blocks or whole numbers.

    Raises:
      ValueError: The model has no adapters.

    Examples:
      >>> import gemma_jax as gj
      >>> import jax
      >>> model = gj.load_model("checkpoints/digits")
      >>> trained, frozen, join = gj.lora(model, gj.Lora(rank=2), jax.random.key(0))
      >>> merged = gj.merge(join(trained, frozen))
      >>> bool((merged.blocks[0][0].attn.q.w[...] == model.blocks[0][0].attn.q.w[...]).all())
      True
    """
    values = {path: param.get_value() for path, param in flat_params(model).items()}
    adapted = {path: _merged(v) for path, v in values.items() if isinstance(v, Adapted)}
    if not adapted:
        raise ValueError("the model has no adapters to merge")
    return with_params(model, adapted)


def _merged(weight: Adapted) -> jax.Array:
    """Layer by layer, so that no stack exists in float32."""
    if weight.scale.ndim == 0:
        return weight.dense()
    layers = range(len(weight.scale))
    return jnp.stack([jax.tree.map(lambda a, i=i: a[i], weight).dense() for i in layers])
