"""What a checkpoint holds, without reading its weights."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import abstract_model
from gemma_jax.weights.tree import ParamPath

from .beside_config import check_block
from .formats import open_source
from .kept import kept_bytes
from .matching import match
from .params import named_slots, params_by_part
from .select_parts import config_for
from .tokenizers import find_tokenizer


@dataclass(frozen=True)
class Description:
    """Holds the facts that the headers of a checkpoint tell.

    Attributes:
      path, format, config: As in `Source`.
      params_by_part: `text`, and of models that see `vision.tower` and `vision.projector` ->
        number of parameters.
      tensor_bytes: Encoding (`BF16`, `Q4_K`, ...) -> bytes in the file.
      tokenizer: Path of the vocabulary; `None` if the checkpoint has none.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> about = gc.describe("checkpoints/digits")
      >>> about.format, about.num_params, about.tensor_bytes
      ('Hugging Face', 344832, {'BF16': 689664})
    """

    path: Path
    format: str
    config: GemmaConfig
    params_by_part: Mapping[str, int]
    tensor_bytes: Mapping[str, int]
    tokenizer: Path | None

    @property
    def num_params(self) -> int:
        return sum(self.params_by_part.values())


def describe(
    path: str | Path,
    *,
    modalities: Collection[str] | None = None,
    mmproj: str | Path | None = None,
) -> Description:
    """Describes a checkpoint by its headers: config, parameters, bytes.

    Of weights it reads a stored output head and the embedding, to tell whether they are one.

    Args:
      modalities: As in `load_weights`: what is left out is not described, and may be absent.
      mmproj: As in `load_weights`.

    Raises:
      CheckpointError: with everything that would keep it from loading, except the weights' values.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.describe("checkpoints/elastic").config.laurel_rank
      8
    """
    source = open_source(path, mmproj=mmproj)
    cfg = config_for(source, modalities)
    check_block(source, cfg)
    moves = match(source, named_slots(abstract_model(cfg, layout="scan")))
    by_encoding = Counter()
    for move in moves:
        by_encoding[move.info.encoding] += move.info.nbytes
    return Description(
        path=source.path,
        format=source.format,
        config=cfg,
        params_by_part=params_by_part(cfg),
        tensor_bytes=dict(by_encoding),
        tokenizer=find_tokenizer(source.path),
    )


def stored_bytes(path: str | Path, *, mmproj: str | Path | None = None) -> dict[ParamPath, int]:
    """Bytes of every parameter if the quantised blocks of a checkpoint stay as they are.

    Layers are apart (`layout="unrolled"`), and all that is no such block is bfloat16.

    Returns:
      Path of the parameter -> bytes; empty if the checkpoint has no blocks that can be kept.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.stored_bytes("checkpoints/digits")
      {}
    """
    source = open_source(path, mmproj=mmproj)
    if not any(info.form for info in source.tensors.values()):
        return {}
    return kept_bytes(source, abstract_model(source.config, layout="unrolled"))
