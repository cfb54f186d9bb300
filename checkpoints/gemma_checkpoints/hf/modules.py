"""The modules of a running model of transformers, and which parameter of ours each is.

They are what PEFT names: `model.language_model.layers.0.self_attn.q_proj`. Published files spell
the same in other ways, see `names.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma
from gemma_jax.weights.tree import flat_params

from ..name_table import Row, expand
from ..params import Slot, depths, named_slots
from ..rearrange import Rearrange
from ..rearrange import shape as side_shape
from .names import EMBEDDING, HEAD, OWN_HEAD, hf_table

TOWERS = tuple(
    f"{name}."
    for name in "vision_tower audio_tower multi_modal_projector embed_vision embed_audio".split()
)
WEIGHT = ".weight"
TABLES = tuple(
    "embed_tokens embed_tokens_per_layer embed_vision.embedding embed_audio.embedding".split()
)


@dataclass(frozen=True)
class Module:
    """A linear map or table of transformers, and the parameter of ours that it is.

    Attributes:
      name: Of ours, in one layer.
      path: Of theirs, as short as the tables have it: `layers.0.self_attn.q_proj`.
      row: How ours comes from theirs.
      slot: Where ours lives.
    """

    name: str
    path: str
    row: Row
    slot: Slot

    @property
    def is_table(self) -> bool:
        """Whether rows of it are looked up."""
        return self.path in TABLES

    @property
    def sides(self) -> tuple[str, str]:
        """Letters of their outputs, and of their inputs, in their order."""
        if self.row.parsed is None:
            dims = self.slot.dims
            return dims[:1], dims[1:]
        outputs, inputs = self.row.parsed.left
        return outputs, inputs

    @property
    def shape(self) -> tuple[int, int]:
        """Of their matrix, `[outputs, inputs]`."""
        outputs, inputs = (side_shape((side,), self.slot.sizes)[0] for side in self.sides)
        return outputs, inputs

    def ours(self, array: np.ndarray, *, output: bool) -> np.ndarray:
        """A factor, `[outputs, r]` or `[r, inputs]`, or a vector of outputs, with our axes."""
        return self._moved(array, output=output, back=False)

    def theirs(self, array: np.ndarray, *, output: bool) -> np.ndarray:
        """The way back."""
        return self._moved(array, output=output, back=True)

    def _moved(self, array: np.ndarray, *, output: bool, back: bool) -> np.ndarray:
        side = self.sides[0 if output else 1]
        ordered = "".join(letter for letter in self.slot.dims if letter in side)
        sizes = dict(self.slot.sizes)
        vector = array.ndim == (len(side) if back else 1)
        if not vector:
            sizes["_"] = array.shape[-1 if output else 0]
        left, right, rank = (side,), tuple(ordered), () if vector else ("_",)
        if output:
            rearrange = Rearrange((*left, *rank), (*right, *rank))
        else:
            rearrange = Rearrange((*rank, *left), (*rank, *right))
        return (rearrange.inverse if back else rearrange)(array, sizes)


def tensor_rows(model: Gemma) -> dict[str, tuple[str, Row]]:
    """Their tensor, as short as the tables have it -> name of ours, and the row."""
    rows = expand(hf_table(model.cfg), depths(model.cfg))
    found = {row.theirs: (name, row) for name, row in rows.items()}
    if model.cfg.tied_head:  # which an adapter may untie
        found[HEAD] = (OWN_HEAD.ours, OWN_HEAD)
    return found


def modules_of(model: Gemma) -> dict[str, Module]:
    """Path of theirs, short -> module, for all that may have factors."""
    slots, params = named_slots(model), flat_params(model)
    if model.cfg.tied_head:
        slots[OWN_HEAD.ours] = slots["embed.table"]
    found = {}
    for theirs, (name, row) in tensor_rows(model).items():
        slot = slots.get(name)
        if slot is None or not theirs.endswith(WEIGHT) or not _is_matrix(row, slot, params):
            continue
        path = theirs.removesuffix(WEIGHT)
        found[path] = Module(name, path, row, slot)
    return found


def _is_matrix(row: Row, slot: Slot, params: Mapping) -> bool:
    """Whether theirs is a linear map or a table: a convolution has letters of its window."""
    if not params[slot.path].get_metadata().get("inputs") or "timm_model" in row.theirs:
        return False
    return len(slot.dims) == 2 if row.parsed is None else len(row.parsed.left) == 2


def prefix_of(path: str, cfg: GemmaConfig) -> str:
    """What a running model of transformers 5 puts in front of a short path."""
    if path.startswith(HEAD.removesuffix(WEIGHT)):
        return ""
    alone = cfg.vision is None and cfg.audio is None
    return "model." if alone or path.startswith(TOWERS) else "model.language_model."


def in_memory(cfg: GemmaConfig, paths: Iterator[str]) -> dict[str, str]:
    """Short path -> path in a running model."""
    return {path: prefix_of(path, cfg) + path for path in paths}


EMBEDDING_PATH, HEAD_PATH = EMBEDDING.removesuffix(WEIGHT), HEAD.removesuffix(WEIGHT)
