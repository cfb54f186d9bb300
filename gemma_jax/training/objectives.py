"""What a step can lower: functions `(model, batch, key) -> (loss, metrics)`.

Options of one are given by `functools.partial`. Where a loss is a mean over tokens, its metrics say
over how many (`tokens`), so that the means of several batches can be weighted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.losses import loss_and_weight
from gemma_jax.decoder.model import Gemma
from gemma_jax.matformer.slicing import at
from gemma_jax.matformer.submodel import Slice
from gemma_jax.multimodal.media import Media


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainBatch:
    """Holds the inputs of a pass, and what is to be said of them.

    Attributes:
      batch: What the model reads.
      targets_BT: int32; see `loss`.
      weights_BT: float32; see `loss`.
      media: Images and sounds, for towers to read in every step: so these may be trained, too.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> tokens = np.array([[2, 5, 7]])
      >>> answer = gj.TrainBatch(tokens, weights_BT=np.array([[0.0, 0.0, 1.0]]))
      >>> answer.weights_BT.shape
      (1, 3)
    """

    batch: Batch | jax.Array
    targets_BT: jax.Array | None = None
    weights_BT: jax.Array | None = None
    media: Media | None = None

    @classmethod
    def of(cls, batch: "TrainBatch | Batch | jax.Array") -> "TrainBatch":
        """A batch as it is, its inputs in full; anything else as one whose tokens all count."""
        batch = batch if isinstance(batch, TrainBatch) else cls(batch)
        return replace(batch, batch=Batch.of(batch.batch))

    def read(self, model: Gemma) -> Batch:
        """What the decoder of `model` reads: soft tokens in their places, as its towers make them.

        Every objective reads its batches so.

        Raises:
          ValueError: There are soft tokens already beside the media, or the model has no encoder
            for them.
        """
        batch = Batch.of(self.batch)
        if self.media is None:
            return batch
        if batch.soft is not None:
            raise ValueError("the batch has soft tokens already: leave out these or its media")
        return replace(batch, soft=self.media.soft(model))


def next_token(
    model: Gemma,
    batch: TrainBatch | Batch | jax.Array,
    key: jax.Array | None = None,
    *,
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the mean cross-entropy of the next token; see `loss`.

    Returns:
      The loss, and `tokens`: how many targets count, each as much as it weighs.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model, tok = gj.load("checkpoints/digits", modalities=("text",), layout="scan")
      >>> tokens = np.array([tok.encode("Which digit is left?", bos=True)])
      >>> loss, metrics = gj.next_token(model, tokens)
      >>> print(f"{loss:.2f} over {metrics['tokens']:.0f} tokens")
      6.74 over 5 tokens
    """
    batch = TrainBatch.of(batch)
    value, tokens = loss_and_weight(
        model,
        batch.read(model),
        targets_BT=batch.targets_BT,
        weights_BT=batch.weights_BT,
        z_loss=z_loss,
    )
    return value, {"tokens": tokens}


def elastic(
    model: Gemma,
    batch: TrainBatch | Batch | jax.Array,
    key: jax.Array | None = None,
    *,
    submodels: Sequence[Slice] = (),
    z_loss: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the mean of the losses of a MatFormer and of models inside it, on the same tokens.

    Devvrit et al., 2023. The models: the whole; each of `submodels`; and, if the batch has
    `ffn_widths_L`, the model of these widths, which may be others in every batch.

    Returns:
      The loss, its parts `whole`, `slice_0` and so on, and `narrow`, and `tokens`.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> from gemma_jax import matformer
      >>> model, tok = gj.load("checkpoints/elastic")
      >>> tokens = np.array([tok.encode("The tuple is a list that", bos=True)])
      >>> half = matformer.Slice(ffn_widths=(128,) * 10)
      >>> loss, metrics = gj.elastic(model, tokens, submodels=(half,))
      >>> sorted(metrics)
      ['slice_0', 'tokens', 'whole']
    """
    batch = TrainBatch.of(batch)
    read = batch.read(model)  # towers belong to the whole: all models inside see the same
    batch = replace(batch, batch=read, media=None)
    plain = replace(batch, batch=replace(read, ffn_widths_L=None))
    inside = {"whole": (model, plain)}
    inside |= {f"slice_{i}": (at(model, submodel), plain) for i, submodel in enumerate(submodels)}
    if read.ffn_widths_L is not None:
        inside["narrow"] = (model, batch)
    said = {name: next_token(m, rows, key, z_loss=z_loss) for name, (m, rows) in inside.items()}
    losses = {name: value for name, (value, _) in said.items()}
    _, metrics = said["whole"]
    return jnp.asarray(sum(losses.values()) / len(losses)), losses | metrics
