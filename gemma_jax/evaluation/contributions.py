"""What the parts of every layer add to the residual stream, or streams, by size."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.patching import Patch


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
    (`per_layer`, nothing to the first stream). The sum of all parts is the stream that enters the
    next layer.

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
        names[2:] = ["altup_predictions", *(["per_layer_outputs"] if model.per_layer else [])]
    found = forward(model, batch, logits="none", capture=names, patch=patch).captured
    return {name: jnp.linalg.norm(part, axis=-1) for name, part in _parts(model, found).items()}


def _parts(model: Gemma, found: dict[str, jax.Array]) -> dict[str, jax.Array]:
    found = {name: jnp.asarray(array, jnp.float32) for name, array in found.items()}
    first, after = found["inputs_embeds"], found["layer_outputs"]
    first = first if model.streams is None else model.streams.spread(first)
    before = jnp.concatenate([first[None], after[:-1]])
    if model.streams is None:
        return {
            "stream": before,
            "attention": found["attention_outputs"],
            "ffn": found["ffn_outputs"],
        }
    predicted = found["altup_predictions"]
    parts = {"stream": before, "prediction": predicted - before}
    if (added := found.get("per_layer_outputs")) is None:
        return parts | {"correction": after - predicted}
    added = jnp.repeat(added[:, None], after.shape[1], axis=1).at[:, 0].set(0)
    return parts | {"correction": after - added - predicted, "per_layer": added}
