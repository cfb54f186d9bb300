"""The parameters of a model by names that do not depend on how its layers are stacked."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import ascii_lowercase

from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma, abstract_model
from gemma_jax.decoder.names import EMBEDDERS, layer_names
from gemma_jax.encoder_config import MobileNetConfig, VisionConfig
from gemma_jax.weights.tree import ParamPath, dims_of, flat_params


@dataclass(frozen=True)
class Slot:
    """Where one named parameter lives.

    Attributes:
      path: Of the (possibly stacked) Param in the model's state.
      row: Along the leading axis of a stacked Param; `None` if it is not stacked.
      dims: Letters of the axes, without the leading one.
      shape: Their sizes.
    """

    path: ParamPath
    row: int | None
    dims: str
    shape: tuple[int, ...]

    @property
    def sizes(self) -> Mapping[str, int]:
        return dict(zip(self.dims, self.shape, strict=True))


def named_slots(model: Gemma) -> dict[str, Slot]:
    """Name -> slot: `embed.table`, `blocks.0.attn.q.w`, `vision.tower.blocks.3.attn.q.bias`, ..."""
    return {
        name: slot
        for path, param in flat_params(model).items()
        for name, slot in _slots(path, param, model)
    }


def depths(cfg: GemmaConfig) -> dict[str, int]:
    """Number of layers by stack, as names of parameters begin: `blocks`, `vision.tower.blocks`."""
    found = {"blocks": len(cfg.layers)}
    if isinstance(cfg.vision, VisionConfig):
        found["vision.tower.blocks"] = cfg.vision.num_layers
    if cfg.audio is not None:
        found["audio.tower.blocks"] = cfg.audio.num_layers
    return found


def params_by_part(cfg: GemmaConfig) -> dict[str, int]:
    """Number of parameters in `text`; in `vision.tower` and `audio.tower` if there are such; and in
    what maps their results to the decoder's width, `vision.projector` and `audio.projector`; and
    in `text_embedding`, the dense layers behind a decoder that makes embeddings."""
    counts = Counter()
    for name, slot in named_slots(abstract_model(cfg, layout="scan")).items():
        counts[_part(name, cfg)] += math.prod(slot.shape)
    return dict(counts)


def _part(name: str, cfg: GemmaConfig) -> str:
    first, second, *_ = name.split(".")
    if first == EMBEDDERS:
        sees = cfg.vision is not None and isinstance(cfg.vision, MobileNetConfig)
        ids = cfg.vocabulary_of(cfg.vision.image_token) if sees else None
        image = ids is not None and cfg.modality_vocabularies[ids].first_id == int(second)
        hears = cfg.audio is not None and not image
        return "vision.projector" if image else "audio.projector" if hears else "text"
    if first in ("vision", "audio"):
        return f"{first}.{'projector' if second == 'projector' else 'tower'}"
    return first if first == "text_embedding" else "text"


def _slots(path: ParamPath, param: nnx.Param, model: Gemma) -> Iterator[tuple[str, Slot]]:
    shape = tuple(param.get_value().shape)
    for name, row in layer_names(path, model):
        own = shape if row is None else shape[1:]
        # Modules of a user's own may have no letters.
        yield name, Slot(path, row, dims_of(param) or ascii_lowercase[: len(own)], own)
