"""Documents become the arrays of a batch."""

from collections.abc import Sequence

import numpy as np

from gemma_jax.decoder.batch import Batch
from gemma_jax.multimodal.encode import Clips
from gemma_jax.multimodal.media import Media
from gemma_jax.multimodal.modality import Modality
from gemma_jax.training.data.documents import Document, Run
from gemma_jax.training.objectives import TrainBatch


def assemble(
    rows: Sequence[Sequence[Document]],
    tokens_per_row: int,
    *,
    pad_id: int = 0,
    packed: bool = True,
    modalities: Sequence[Modality] = (),
    most: dict[str, int] | None = None,
    shapes: dict[str, tuple[int, ...]] | None = None,
    first_row: int = 0,
    all_rows: int | None = None,
) -> TrainBatch:
    """A batch of these rows, of a shape that does not depend on what is in them.

    Args:
      packed: Whether rows may hold several documents.
      modalities: Of the model, in its order.
      most: Name of a modality -> items that each row has room for.
      shapes: Name of a modality -> shape of what its encoder reads of one item.
      first_row, all_rows: Where these rows lie in the batch of all processes: indices of soft
        tokens count through all of it.

    Returns:
      NumPy arrays: positions count along a row and are -1 behind its last document; documents are
      numbered from 1, and so is what is behind them. Weights are 1 where a token is trained.
    """
    B, T = len(rows), tokens_per_row
    tokens_BT = np.full((B, T), pad_id, np.int32)
    positions_BT = np.full((B, T), -1, np.int32)
    documents_BT = np.ones((B, T), np.int32)
    weights_BT = np.zeros((B, T), np.float32)
    for b, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents, 1):
            inside = slice(start, start + len(document.ids))
            tokens_BT[b, inside] = document.ids
            documents_BT[b, inside] = number
            weights_BT[b, inside] = document.trained
            start = inside.stop
        positions_BT[b, :start] = np.arange(start)
        documents_BT[b, start:] = len(documents) + 1
    used = [modality for modality in modalities if (most or {}).get(modality.name)]
    media = None
    if used:
        places = _Places(used, most, first_row, B if all_rows is None else all_rows)
        media = _media(rows, T, places, shapes)
    batch = Batch(tokens_BT, positions_BT, documents_BT=documents_BT if packed else None)
    return TrainBatch(batch, weights_BT=weights_BT, media=media)


class _Places:
    """Which soft token stands where: every row has its own items, whether it needs them or not."""

    def __init__(self, used: Sequence[Modality], most: dict[str, int], first_row: int, rows: int):
        self.used, self.most, self.first_row = used, most, first_row
        self.width = max(modality.tokens_per_item for modality in used)
        counts = [most[modality.name] * rows for modality in used]
        firsts = np.cumsum([0, *counts[:-1]]).tolist()
        self.first = {modality.name: first for modality, first in zip(used, firsts)}
        self.bidirectional = {modality.name: modality.bidirectional for modality in used}

    def item(self, run: Run, row: int, count: int) -> int:
        """The number of a row's item among those of all rows."""
        most = self.most[run.modality]
        return self.first[run.modality] + (self.first_row + row) * most + count


def _media(rows, T: int, places: _Places, shapes: dict[str, tuple[int, ...]]) -> Media:
    index_BT = np.full((len(rows), T), -1, np.int32)
    block_BT = np.zeros((len(rows), T), np.int32)
    inputs = {
        m.name: np.zeros((len(rows) * places.most[m.name], *shapes[m.name]), np.float32)
        for m in places.used
    }
    lengths = {name: np.ones(len(values), np.int32) for name, values in inputs.items()}
    for b, documents in enumerate(rows):
        counts = dict.fromkeys(inputs, 0)
        start = 0
        for document in documents:
            for run in document.runs:
                name, count = run.modality, counts[run.modality]
                counts[name] += 1
                item = places.item(run, b, count)
                inside = slice(start + run.start, start + run.start + run.size)
                index_BT[b, inside] = item * places.width + np.arange(run.size)
                block_BT[b, inside] = (item + 1) * places.bidirectional[name]
                slot = b * places.most[name] + count
                inputs[name][slot][tuple(slice(size) for size in run.values.shape)] = run.values
                lengths[name][slot] = len(run.values)
            start += len(document.ids)
    given = {
        name: Clips(values, lengths[name]) if name == "audio" else values
        for name, values in inputs.items()
    }
    causal = not any(places.bidirectional.values())
    return Media(inputs=given, index_BT=index_BT, block_BT=None if causal else block_BT)
