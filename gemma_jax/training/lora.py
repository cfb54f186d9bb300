"""Adapters as what is trained: where they go, how they begin, and the way back to a model.

    trained, frozen, join = gj.lora(model, gj.Lora(rank=8), jax.random.key(0))

The triple is that of `trainable`, so a step asks for nothing else. The frozen weights may be stored
in any form: over whole numbers or the blocks of a file this is QLoRA.
"""

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.adapters import HEAD, TABLE, Adapter, Factors, adapt
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.names import layer_names
from gemma_jax.training.trainable import Params, Trainable
from gemma_jax.weights.adapted import Adapted, row_norms, with_magnitudes
from gemma_jax.weights.protocol import Weight
from gemma_jax.weights.tree import ParamPath, flat_params, with_params

A, B, SCALE, MAGNITUDE = "a", "b", "scale", "magnitude"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Says which matrices get adapters, and of which kind.

    Attributes:
      rank: Of the factors.
      alpha: Their product counts `alpha / rank`, or `alpha / sqrt(rank)` with `rslora`.
      targets: Patterns of names of ours (`blocks.*.attn.q.w`, `embed.table`), as in `quantise`.
        Default: attention and feed-forward of the decoder.
      target_modules: In their place PEFT's own: names, which are ends of paths (`("q_proj",)`), or
        one regular expression for whole paths of modules of transformers. By name they mean towers,
        too.
      layers: Of the decoder, by number; default: all.
      rank_pattern, alpha_pattern: Pattern -> another rank or alpha; the first that fits decides.
        Patterns are what the targets are: of our names, or PEFT's regular expressions.
      whole: Parameters that are trained whole beside the adapters, by patterns; with
        `target_modules` these are PEFT's `modules_to_save`, ends of paths.
      dora: Trains magnitudes of rows as well (Liu et al., 2024).
      rslora: See `alpha` (Kalajdzievski, 2023).
      tie_head: Whether a head that is the embedding table has the table's adapter as well. Without,
        it stays as it is, and is a head of its own from then on.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.Lora(rank=4, targets=("blocks.*.attn.*",)).alpha
      16.0
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("blocks.*.attn.*", "blocks.*.ffn.*")
    target_modules: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    dora: bool = False
    rslora: bool = False
    tie_head: bool = False

    def __post_init__(self):
        ranks = {"rank": self.rank, **self.rank_pattern}
        alphas = {"alpha": self.alpha, **self.alpha_pattern}
        for name, value in (ranks | alphas).items():
            if not value > 0:
                raise ValueError(f"{name}={value!r} must be positive")
        if wrong := [value for value in ranks.values() if value != int(value)]:
            raise ValueError(f"rank {wrong[0]!r} must be a whole number")
        if isinstance(self.targets, str) or isinstance(self.whole, str):
            raise ValueError("targets and whole are tuples of patterns; put the one into a tuple")

    def scale(self, rank: int, alpha: float) -> float:
        """What the product of factors counts."""
        return alpha / rank**0.5 if self.rslora else alpha / rank


Chosen = Mapping[str, tuple[int, float]]  # name in one layer -> rank and scale


def chosen_by_name(model: Gemma, settings: Lora) -> tuple[Chosen, set[str]]:
    """What the settings mean by patterns of our names: matrices, and what is trained whole.

    Raises:
      ValueError: A pattern that means nothing in this model.
    """
    chosen, whole, unused = {}, set(), {*settings.targets, *settings.whole}
    for path, param in flat_params(model).items():
        matrix = bool(param.get_metadata().get("inputs"))
        for name, _ in layer_names(path, model):
            if fits := [p for p in settings.whole if fnmatchcase(name, p)]:
                whole.add(name)
            elif fits := [p for p in settings.targets if matrix and fnmatchcase(name, p)]:
                if _in_layers(name, settings.layers):
                    rank = _by_pattern(settings.rank_pattern, name, settings.rank)
                    alpha = _by_pattern(settings.alpha_pattern, name, settings.alpha)
                    chosen[name] = (rank, settings.scale(rank, alpha))
            unused -= set(fits)
    if unused:
        known = ", ".join(
            next(layer_names(path, model))[0] for path in list(flat_params(model))[:3]
        )
        raise ValueError(
            f"{sorted(unused)[0]!r} means nothing in this model; names are such as {known}, and "
            "PEFT's names of modules go into target_modules"
        )
    return chosen, whole


def _in_layers(name: str, layers: tuple[int, ...] | None) -> bool:
    if layers is None:
        return True
    stack, _, rest = name.partition(".")
    return stack == "blocks" and int(rest.partition(".")[0]) in layers


def _by_pattern(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    return next((v for pattern, v in patterns.items() if fnmatchcase(name, pattern)), default)


def begin(
    model: Gemma, chosen: Chosen, whole: Collection[str], settings: Lora, key: jax.Array
) -> Trainable:
    """Puts new adapters into a model, as the first moment of training; see `lora`.

    Factors do not depend on how layers are stacked.
    """
    if not chosen and not whole:
        raise ValueError("the settings choose nothing to train")
    if abstract(model):
        return _begin_abstract(model, chosen, whole, settings, key)
    slots = {n: p for p, v in flat_params(model).items() for n, _ in layer_names(p, model)}
    params = flat_params(model)
    head = HEAD if model.cfg.tied_head else None
    factors = {
        name: _new(params[slots[TABLE if name == head else name]], name, *chosen[name], key)
        for name in chosen
    }
    touched = TABLE in chosen or TABLE in whole
    own_head = model.cfg.tied_head and touched and not settings.tie_head
    kept = {HEAD: params[slots[TABLE]].get_value()} if head in whole else {}
    model = adapt(model, Adapter(factors, kept, own_head))
    if settings.dora:
        model = with_params(model, {p: _with_gain(v) for p, v in _adapted(model).items()})
    return train_adapters(model, whole)


def abstract(model: Gemma) -> bool:
    """Whether a model has shapes in the place of arrays."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))


def _begin_abstract(model: Gemma, *rest) -> Trainable:
    join = None

    def parts(model: Gemma, key: jax.Array):
        nonlocal join
        trained, frozen, join = begin(model, *rest[:-1], key)
        return trained, frozen

    trained, frozen = jax.eval_shape(parts, model, rest[-1])
    return Trainable(trained, frozen, join)


def _new(param: nnx.Param, name: str, rank: int, scale: float, key: jax.Array) -> Factors:
    """`b` is 0, and `a` uniform in +-1 / sqrt(inputs), or normal for a table of rows (PEFT)."""
    dims, inputs = (param.get_metadata()[kind] for kind in ("dims", "inputs"))
    table = dims.startswith("V")
    shape = tuple(param.get_value().shape)[-len(dims) :]
    cut = 1 if table else len(dims) - len(inputs)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()) % 2**31)
    full = (rank, *shape[cut:])
    if table:
        a = jax.random.normal(key, full)
    else:
        bound = float(max(1, _product(shape[cut:]))) ** -0.5
        a = jax.random.uniform(key, full, minval=-bound, maxval=bound)
    return Factors(a, jnp.zeros((*shape[:cut], rank)), scale)


def _product(sizes: tuple[int, ...]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _with_gain(weight: Adapted) -> Adapted:
    return replace(weight, gain=jnp.ones(weight.b.shape[:-1], jnp.float32))


def _adapted(model: Gemma) -> dict[ParamPath, Adapted]:
    values = {path: param.get_value() for path, param in flat_params(model).items()}
    return {path: value for path, value in values.items() if isinstance(value, Adapted)}


def train_adapters(model: Gemma, whole: Collection[str] = ()) -> Trainable:
    """Splits a model with adapters into these, all else, and the way back.

    Args:
      whole: Names in one layer of parameters that are trained whole.

    Returns:
      See `trainable`. What is trained has the path of its parameter, and behind that `"a"`, `"b"`
      or `"magnitude"`; frozen are the weight, under its path, and `"scale"`.

    Raises:
      ValueError: Nothing is to be trained; or some layers of a stack, and not all of it, whole.
    """
    params, adapted = flat_params(model), _adapted(model)
    trained: Params = {}
    frozen: dict[ParamPath, Weight] = {p: v.get_value() for p, v in params.items()}
    for path, value in adapted.items():
        trained |= {(*path, A): value.a, (*path, B): value.b}
        frozen |= {path: value.base, (*path, SCALE): value.scale}
        if value.gain is not None:
            trained[(*path, MAGNITUDE)] = value.gain * row_norms(value)
    for path in _whole_paths(model, whole):
        trained[path] = frozen.pop(path)
    if not trained:
        raise ValueError("the model has no adapters, and nothing is trained whole")
    hollow = with_params(model, dict.fromkeys(params))
    return Trainable(trained, frozen, partial(_join, hollow, tuple(adapted)))


def _whole_paths(model: Gemma, whole: Collection[str]) -> list[ParamPath]:
    paths, left = [], set(whole)
    for path, param in flat_params(model).items():
        names = {name for name, _ in layer_names(path, model)}
        if not names & left:
            continue
        if not names <= set(whole):
            raise ValueError(
                f"{min(names & left)} lies in one array with {min(names - left)}, which is not "
                'trained; load the model with layout="unrolled"'
            )
        if not isinstance(value := param.get_value(), jax.Array | jax.ShapeDtypeStruct):
            raise ValueError(f"{min(names)} is {type(value).__name__}, which has no gradient")
        paths.append(path)
        left -= names
    if left:
        raise ValueError(f"the model has no {min(left)} to train")
    return paths


def _join(
    hollow: Gemma, adapted: tuple[ParamPath, ...], trained: Params, frozen: Mapping[Any, Weight]
) -> Gemma:
    params = flat_params(hollow)
    own = {path: value for path, value in {**frozen, **trained}.items() if path in params}
    for path in adapted:
        weight = Adapted(frozen[path], trained[*path, A], trained[*path, B], frozen[*path, SCALE])
        magnitude = trained.get((*path, MAGNITUDE))
        own[path] = weight if magnitude is None else with_magnitudes(weight, magnitude)
    return with_params(hollow, own)
