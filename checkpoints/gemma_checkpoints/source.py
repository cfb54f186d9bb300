"""What the loader needs to know of a checkpoint, whatever its format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from gemma_jax.config import GemmaConfig

from .blocks import BlockForm, Blocks
from .name_table import Table


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
      shape: Row = output, as Hugging Face has it, also for GGUF.
      encoding: How it is stored: `BF16`, `Q4_K`, ...
      dtype: Of the NumPy array that reading gives.
      nbytes: In the file.
      form: How a quantised tensor can be kept in memory; `None` if it cannot, or is none.
    """

    shape: tuple[int, ...]
    encoding: str
    dtype: np.dtype
    nbytes: int
    form: BlockForm | None = None


class Source(Protocol):
    """Reads an opened checkpoint, whatever its format: headers are checked, weights not yet read.

    Attributes:
      path: Where it lies.
      format: For people: `"Hugging Face"`, `"GGUF"`, `"Orbax"`.
      config: The architecture that the checkpoint declares.
      table: Which of its tensors is which parameter.
      tensors: Name as in `table` -> what is known of it.
      spoilt: Modality (`"image"`) that it declares and that cannot be read -> why.
      beside_config: What the model was besides its config, as `beside_config.py` says it; `None`
        where the format does not know.
      reads_rows: Whether some rows of a tensor can be had without reading all of it.
      notes: Lines on what the checkpoint asks for and is done otherwise here.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> source = gc.open_source("checkpoints/elastic")
      >>> source.tensors["norm.weight"].encoding
      'BF16'
    """

    path: Path
    format: str
    config: GemmaConfig
    table: Table
    tensors: Mapping[str, TensorInfo]
    spoilt: Mapping[str, str]
    beside_config: tuple[str, ...] | None
    reads_rows: bool
    notes: Sequence[str]

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        """Part of one tensor along its first two axes, `TensorInfo.dtype`. May run in any thread.

        A tensor of one axis has rows alone.
        """
        ...

    def read_blocks(self, name: str, rows: slice = slice(None)) -> Blocks:
        """Rows of a tensor that has a `TensorInfo.form`, as they are stored. May run in any thread.

        Whole rows: columns are taken from what is read.
        """
        ...
