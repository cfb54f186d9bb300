"""What the parts of every layer add to the residual stream or streams, by size, and to a logit."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.names import layer_names
from gemma_jax.decoder.patching import Patch
from gemma_jax.weights.tree import flat_params

_SUB_BLOCKS = ("attention", "ffn", "per_layer")  # those that add to the stream


def contributions(
    model: Gemma,
    batch: Batch | jax.typing.ArrayLike | Sequence[Sequence[int]],
    *,
    patch: Patch | None = None,
) -> dict[str, jax.Array]:
    """Measures what each part of a layer adds to the stream: L2 norms, and the stream's before it.

    In Gemma 1 to 3 a layer adds `attention` and `ffn` to its `stream`, `[L, B, T]`. In Gemma 3n it
    adds to each of its streams, `[L, A, B, T]`, the mixture that AltUp predicts (`prediction`), the
    step to what the layer computes of one of them (`correction`), and its per-layer inputs
    (`per_layer`, nothing to the first stream). Gemma 4 adds `attention`, `ffn` and `per_layer` to
    one stream, and then scales it: what that changes is `scale`. The sum of all parts is the stream
    that enters the next layer.

    Args:
      batch: As `forward` takes it.
      patch: As `forward` takes it.

    Returns:
      By the name of the part, float32, `stream` first. The parts themselves are what `forward`
      captures as `attention_outputs`, `ffn_outputs`, `altup_predictions`, `per_layer_outputs`.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> parts = gj.contributions(model, [tok.encode("Which digit is left?", bos=True)])
      >>> {name: norms.shape for name, norms in parts.items()}
      {'stream': (3, 1, 6), 'attention': (3, 1, 6), 'ffn': (3, 1, 6)}
    """
    names = ["inputs_embeds", "layer_outputs", "attention_outputs", "ffn_outputs"]
    if model.streams is not None:
        names[2:] = ["altup_predictions"]
    names += ["per_layer_outputs"] if model.per_layer else []
    found = forward(model, batch, logits="none", capture=names, patch=patch).captured
    return {name: jnp.linalg.norm(part, axis=-1) for name, part in _parts(model, found).items()}


def logit_contributions(
    model: Gemma,
    batch: Batch | jax.typing.ArrayLike | Sequence[Sequence[int]],
    token: int,
    *,
    against: int | None = None,
    position: int = -1,
) -> dict[str, jax.Array]:
    """Splits the logit of one token into what each part of each layer adds to it.

    The final norm divides by the size of the whole stream. With that size held, the head is linear
    and the parts add up to the logit, before a soft cap where the model has one ("direct logit
    attribution"). What a part does by way of later layers counts as theirs, but for the scales of
    Gemma 4, which multiply all that was added before.

    Args:
      batch: As `forward` takes it.
      token: Id of the token whose logit is split.
      against: Id of a token whose logit is taken off: what speaks for one rather than the other.
      position: Which of the T tokens of each row predicts it; negative counts from the end.

    Returns:
      float32: `embedding` `[B]`, what enters the first layer; `attention`, `ffn`, and `per_layer`
      where layers have such inputs, `[L, B]`.

    Raises:
      ValueError: What `forward` refuses, ids or positions that there are not, a model that reads
        both ways, or Gemma 3n, whose streams are merged in a way that is no sum.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> ids = tok.encode("How many digits?", bos=True)
      >>> parts = gj.logit_contributions(model, [ids], tok.encode("3")[0])
      >>> {name: added.shape for name, added in parts.items()}
      {'embedding': (1,), 'attention': (3, 1), 'ffn': (3, 1)}
    """
    model.cfg.require_causal("has no next token whose logit could be split")
    if model.streams is not None:
        raise ValueError("Gemma 3n merges its streams, so its logits are no sum over layers")
    batch = Batch.of(batch)
    tokens = batch.tokens_BT.shape[1]
    sizes = [("token", token, 0, model.cfg.vocab_size), ("position", position, -tokens, tokens)]
    if against is not None:
        sizes.append(("against", against, 0, model.cfg.vocab_size))
    for name, given, low, high in sizes:
        if not low <= given < high:
            raise ValueError(f"{name}={given} must lie in [{low}, {high})")
    parts = [*_SUB_BLOCKS[:2], *([_SUB_BLOCKS[2]] if model.per_layer else [])]
    names = ["inputs_embeds", "layer_outputs", *(f"{part}_outputs" for part in parts)]
    found = forward(model, batch, logits="none", capture=names).captured
    at = {name: found[name][..., position, :] for name in names}
    added = _added(model, at, _reaching_L(model), token, against)
    return {name: added[name] for name in ("embedding", *parts)}  # jit sorts them


@jax.jit
def _added(
    model: Gemma, at: dict[str, jax.Array], share_L: jax.Array, token: int, against: int | None
) -> dict[str, jax.Array]:
    """Logits that parts `[(L,) B, D]` of the last stream add, of which these shares reach it."""
    at = {name: jnp.asarray(x, jnp.float32) for name, x in at.items()}

    def size(x: jax.Array) -> jax.Array:  # what the norm divides by
        return jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + model.final_norm.eps)

    whole_BD = at.pop("layer_outputs")[-1]

    def added(x_BD: jax.Array) -> jax.Array:
        normed_BD = model.final_norm(x_BD, model.runtime.numerics) * size(x_BD) / size(whole_BD)
        logits_BV = model.embed.decode(normed_BD[:, None])[:, 0].astype(jnp.float32)
        return logits_BV[:, token] - (0 if against is None else logits_BV[:, against])

    first_BD = at.pop("inputs_embeds")
    by_layer = {
        name.removesuffix("_outputs"): jax.lax.map(added, share_L[:, None, None] * part_LBD)
        for name, part_LBD in at.items()
    }
    return {"embedding": added(share_L[0] * first_BD)} | by_layer


def _reaching_L(model: Gemma) -> jax.Array:
    """float32 `[L]`: what the layer scales leave, at the end, of what a layer adds."""
    scale_L = np.ones(len(model.cfg.layers), np.float32)
    for path, param in flat_params(model).items():
        if path[-2:] == ("layer_scale", "scale"):
            for name, row in layer_names(path, model):
                scale_L[int(name.split(".")[1])] = param.get_value()[row].item()
    return jnp.asarray(np.cumprod(scale_L[::-1])[::-1])


def _parts(model: Gemma, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
    found = {name: jnp.asarray(array, jnp.float32) for name, array in found.items()}
    first, after = found["inputs_embeds"], found["layer_outputs"]
    first = first if model.streams is None else model.streams.spread(first)
    before = jnp.concatenate([first[None], after[:-1]])
    if model.streams is None:
        parts = {name: found[key] for name in _SUB_BLOCKS if (key := f"{name}_outputs") in found}
        parts = {"stream": before} | parts
        return parts | ({"scale": after - sum(parts.values())} if _scales(model) else {})
    predicted = found["altup_predictions"]
    parts = {"stream": before, "prediction": predicted - before}
    if (added := found.get("per_layer_outputs")) is None:
        return parts | {"correction": after - predicted}
    added = jnp.repeat(added[:, None], after.shape[1], axis=1).at[:, 0].set(0)
    return parts | {"correction": after - added - predicted, "per_layer": added}


def _scales(model: Gemma) -> bool:
    return any("layer_scale" in model.cfg.sub_blocks_of(spec) for spec in model.cfg.layers)
