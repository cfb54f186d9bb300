"""Slices of a model's parameters: cut out, or seen in place."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma, abstract_model
from gemma_jax.nn.layer_groups import Layout
from gemma_jax.weights.adapted import alike
from gemma_jax.weights.protocol import Index, Weight
from gemma_jax.weights.tree import ParamPath, dims_of, flat_params, with_params
from gemma_jax.weights.view import Part

from .submodel import Slice, slice_config

TOWERS = ("vision", "audio")  # which a slice keeps whole


def slice_model(
    model: Gemma, submodel: Slice, *, allow_irregular: bool = False, layout: Layout | None = None
) -> Gemma:
    """Cuts a smaller model out of a larger one, with weights of its own to be saved.

    Feed-forward matrices keep their first channels, the per-layer table and its projection the
    parts of the kept layers; the rest is shared with `model`, or copied where layers are stacked
    anew.

    Args:
      allow_irregular: See `slice_config`.
      layout: Of the new model; default: that of `model`.

    Raises:
      ValueError: An illegal slice.

    Examples:
      >>> import gemma_jax as gj
      >>> from gemma_jax import matformer
      >>> model, tok = gj.load("checkpoints/elastic")
      >>> half = matformer.Slice(ffn_widths=128)
      >>> matformer.slice(model, half).blocks[0][0].ffn.up.w.shape  # of the first layer
      (1, 128, 96)
    """
    cfg = slice_config(model.cfg, submodel, allow_irregular=allow_irregular)
    layout = layout or ("unrolled" if _is_unrolled(model) else "scan")
    target, parts = (
        abstract_model(cfg, runtime=model.runtime, layout=layout, block=model.make_block),
        _parts(model, submodel),
    )

    def value(path: ParamPath) -> Weight:
        if path[0] != "blocks":
            return _taken(parts(path, None))
        _, index, position, *rest = path
        group, kept = target.layer_groups[index], submodel.kept(len(model.cfg.layers))
        layers = [kept[group.layer_index(position, r)] for r in range(group.repeats)]
        rows = [_taken(parts(("blocks", *rest), layer)) for layer in layers]
        if len(rows) == 1:
            return rows[0]
        return jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *alike(rows))

    return _with_parts(target, value)


def at(model: Gemma, submodel: Slice, *, allow_irregular: bool = False) -> Gemma:
    """Views a submodel inside a model: it holds the arrays of `model`, and no other.

    What it does not use is cut off inside the compiled programs, at widths that are known when they
    are compiled. Any number of views may be used in turns. Results are those of `slice`, bit for
    bit with plain arrays, to rounding where weights are stored narrower than they are used.

    Raises:
      ValueError: An illegal slice, or layers that are stacked (`layout="scan"`), where one array
        holds widths of several layers.

    Examples:
      >>> import gemma_jax as gj
      >>> from gemma_jax import matformer
      >>> model, tok = gj.load("checkpoints/elastic", layout="unrolled")
      >>> half = matformer.at(model, matformer.Slice(ffn_widths=128))
      >>> [spec.d_ff for spec in half.cfg.layers] == [128] * 10
      True
    """
    if not _is_unrolled(model):
        raise ValueError(
            'a view needs an array per layer; load the model with layout="unrolled", or use '
            "matformer.slice"
        )
    cfg = slice_config(model.cfg, submodel, allow_irregular=allow_irregular)
    target = abstract_model(cfg, runtime=model.runtime, layout="unrolled", block=model.make_block)
    kept, parts = submodel.kept(len(model.cfg.layers)), _parts(model, submodel)

    def value(path: ParamPath) -> Weight:
        if path[0] != "blocks":
            return parts(path, None)
        _, _, position, *rest = path
        return parts(("blocks", *rest), kept[position])

    return _with_parts(target, value)


def _with_parts(target: Gemma, value: Callable[[ParamPath], Weight]) -> Gemma:
    values = {path: value(path) for path in flat_params(target)}
    for path, param in flat_params(target).items():
        if (found := tuple(values[path].shape)) != (shape := param.get_value().shape):
            raise ValueError(
                f"{'.'.join(map(str, path))} cannot be sliced: {list(shape)} of {list(found)} is "
                f"wanted, and its letters {dims_of(param)!r} do not say which axis is F; make it "
                "with `dims`, as Einsum does"
            )
    return with_params(target, values)


def _parts(model: Gemma, submodel: Slice) -> Callable[[ParamPath, int | None], Weight]:
    """`(path, layer) -> value` of a parameter of `model`, or the `Part` of it that the slice uses.

    The path of a layer's parameter is that within its block, after `"blocks"`; its value has a
    leading axis of size 1, as in an unrolled model.
    """
    params = flat_params(model)
    layers, kept = model.cfg.layers, submodel.kept(len(model.cfg.layers))
    width = dict(zip(kept, submodel.widths(model.cfg)))
    places = {
        group.layer_index(position, repeat): (s, position, repeat)
        for s, group in enumerate(model.layer_groups)
        for position in range(len(group.period))
        for repeat in range(group.repeats)
    }

    def find(path: ParamPath, layer: int | None) -> Weight:
        if layer is None:
            param, fewer = params[path], path[0] not in TOWERS and len(kept) < len(layers)
            return _part(param, param.get_value(), "L", kept, fewer)
        index, position, repeat = places[layer]
        param = params["blocks", index, position, *path[1:]]
        value = param.get_value()
        if model.layer_groups[index].repeats > 1:
            value = jax.tree.map(lambda a: a[repeat : repeat + 1], value)
        return _part(param, value, "F", width[layer], width[layer] < layers[layer].d_ff)

    return find


def _part(param: nnx.Param, value: Weight, letter: str, index: Index, narrower: bool) -> Weight:
    dims = dims_of(param)
    if not narrower or letter not in dims:
        return value
    return Part.of(value, dims.index(letter) - len(dims), index)


def _taken(value: Weight) -> Weight:
    return value.taken() if isinstance(value, Part) else value


def _is_unrolled(model: Gemma) -> bool:
    return len(model.layer_groups) == 1 and model.layer_groups[0].repeats == 1


def parameters(cfg: GemmaConfig) -> int:
    """Parameters of the decoder besides the tables that are looked up, of tokens and per layer.

    What Gemma 3n counts as "effective" parameters, without the keys and values that its published
    checkpoints hold for layers which never use them. What sees and hears does not count.
    """
    decoder = replace(cfg, vision=None, audio=None, modality_vocabularies=())
    params = flat_params(abstract_model(decoder))
    tables = (("embed", "table"), ("per_layer", "table"))
    return sum(p.get_value().size for path, p in params.items() if path not in tables)
