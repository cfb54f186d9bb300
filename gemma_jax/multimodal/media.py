"""What is not text in a batch, before a tower has read it: training goes through the towers.

    media = Media.of(model.cfg, tokens_BT, {"image": pixels})
    forward(model, Batch(tokens_BT, soft=media.soft(model)))  # differentiable in the towers, too

Local letters: I items that soft tokens come in.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.soft_tokens import SoftTokens
from gemma_jax.multimodal.encode import Clips
from gemma_jax.multimodal.modality import check_media, modalities_of
from gemma_jax.multimodal.placeholders import joined, locate_all

Input = jax.Array | Clips  # of the I items of one modality


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Media:
    """Holds what encoders read, and where the soft tokens that they make of it go.

    All items of a modality lie in one array, whatever row they are in. The soft tokens of the
    modalities follow one another in the order of `modalities_of(model.cfg)`, and each item takes as
    many places as those with the most soft tokens do: of image `i` and sound `j` after `n` images,
    token `t` has the index `i * width + t` and `(n + j) * width + t`. Items that no index names are
    encoded and change nothing, so a batch may be filled up with them.

    Attributes:
      inputs: Name of a modality -> what its encoder reads: for images float `[I, 3, size, size]` in
        [-1, 1], for sounds `Clips`.
      index_BT: int32; see `SoftTokens`.
      block_BT: int32; see `SoftTokens`.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model = gj.load_model("checkpoints/digits")
      >>> vision = model.cfg.vision
      >>> tokens = np.array([[2] + [vision.image_token] * vision.num_soft_tokens + [5]])
      >>> pixels = np.zeros((1, 3, vision.image_size, vision.image_size), np.float32)
      >>> media = gj.Media.of(model.cfg, tokens, {"image": pixels})
      >>> media.soft(model).embeddings_ITD.shape == (1, vision.num_soft_tokens, 64)
      True
    """

    inputs: dict[str, Input]
    index_BT: jax.Array
    block_BT: jax.Array | None = None

    @classmethod
    def of(cls, cfg: GemmaConfig, tokens_BT: jax.Array, inputs: Mapping[str, Input]) -> "Media":
        """Items in the order of their placeholders in `tokens_BT`, row by row.

        Args:
          cfg: Of the model that will read them.
          inputs: See `Media`.

        Raises:
          ValueError: The model has no encoder for a modality, or nothing is given.
        """
        used = _used(cfg, inputs)
        sizes = {modality.name: modality.tokens_per_item for modality in used}
        if free := [name for name, size in sizes.items() if size is None]:
            raise ValueError(
                f"items of {free[0]} differ in their number of soft tokens; give Media its indices"
            )
        counts = [len(inputs[modality.name]) for modality in used]
        width = max(size for size in sizes.values() if size is not None)
        index_BT, block_BT = locate_all(tokens_BT, used, counts, width)
        return cls(inputs=dict(inputs), index_BT=index_BT, block_BT=block_BT)

    def soft(self, model: Gemma) -> SoftTokens:
        """What the towers of `model` make of the inputs; differentiable.

        Raises:
          ValueError: The model has no encoder for a modality, or nothing is given.
        """
        used = _used(model.cfg, self.inputs)
        encoded = [modality.encode(model, self.inputs[modality.name]) for modality in used]
        return SoftTokens(
            embeddings_ITD=joined(encoded), index_BT=self.index_BT, block_BT=self.block_BT
        )


def _used(cfg: GemmaConfig, inputs: Mapping[str, Input]) -> list:
    """The modalities of the inputs, in the order of the model."""
    modalities = modalities_of(cfg)
    check_media(inputs, modalities)
    used = [modality for modality in modalities if modality.name in inputs]
    if not used:
        raise ValueError("no inputs given; a text alone needs no media")
    return used
