"""What a checkpoint holds, without reading its weights."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_jax.config import GemmaConfig

from .match import match
from .opening import open_source
from .params import abstract_model, named_slots
from .tokenizers import find_tokenizer


@dataclass(frozen=True)
class Description:
    """Facts from the headers of a checkpoint.

    Attributes:
      path, format, config: As in `Source`.
      num_params: Of the text decoder.
      tensor_bytes: Encoding (`BF16`, `Q4_K`, ...) -> bytes in the file, of the text decoder.
      tokenizer: Path of the vocabulary; `None` if the checkpoint has none.
    """

    path: Path
    format: str
    config: GemmaConfig
    num_params: int
    tensor_bytes: Mapping[str, int]
    tokenizer: Path | None


def describe(path: str | Path) -> Description:
    """Opens a checkpoint and holds it against its config.

    Raises:
      CheckpointError: with everything that would keep it from loading, except the weights' values.
    """
    source = open_source(path)
    moves = match(source, named_slots(abstract_model(source.config, layout="scan")))
    by_encoding = Counter()
    for move in moves:
        by_encoding[move.info.encoding] += move.info.nbytes
    return Description(
        path=source.path,
        format=source.format,
        config=source.config,
        num_params=sum(math.prod(move.info.shape) for move in moves),
        tensor_bytes=dict(by_encoding),
        tokenizer=find_tokenizer(source.path),
    )
