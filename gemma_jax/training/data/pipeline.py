"""Batches for a run: any of them by its number, or one after the other through Grain.

Local letters: E documents packed in a row.
"""

import sys
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.text import Tokenizer
from gemma_jax.training.data.assemble import assemble
from gemma_jax.training.data.documents import Document
from gemma_jax.training.data.settings import DataSettings
from gemma_jax.training.data.survey import RowReader, Survey, survey
from gemma_jax.training.objectives import TrainBatch
from gemma_jax.training.preference import PreferenceBatch

_AHEAD = 2  # batches for each thread
_SPREAD = 0x9E3779B1  # Grain draws epoch e of seed s as epoch 0 of s + e: keep seeds apart


def make_data(
    settings: DataSettings,
    tokenizer: Tokenizer,
    cfg: GemmaConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> "Data":
    """Reads all files once, and makes the batches of a run from them.

    Args:
      cfg: Of the model that reads them; says which media there may be.
      process_index, process_count: Each process prepares its own rows of every batch (all read the
        files once, to lay out the rows). What is in a batch depends on settings and files alone, so
        a run may go on with other processes.

    Raises:
      ValueError: Rows that cannot be used, all in one message; or rows of a batch that processes
        cannot share.
      ImportError: Grain is missing.

    Examples:
      >>> import json, tempfile, pathlib
      >>> import gemma_jax as gj
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "texts.jsonl"
      >>> _ = file.write_text("\\n".join(json.dumps({"text": "Hi " * n}) for n in (1, 5, 3)))
      >>> tok = gj.load_tokenizer("checkpoints/elastic")
      >>> cfg = gj.load_model("checkpoints/elastic").cfg
      >>> settings = gj.DataSettings(files=str(file), tokens_per_row=32, rows=2)
      >>> data = gj.make_data(settings, tok, cfg)
      >>> batches = iter(data)
      >>> next(batches).weights_BT.shape
      (2, 32)
      >>> [[place.rpartition(":")[2] for place in row] for row in batches.batch_ids()]
      [['2', '3'], ['1']]
      >>> batches.get_state()["next_batch"], len(data)
      (1, 1)
    """
    _grain()
    return Data(settings, tokenizer, cfg, process_index, process_count)


class Data:
    """Holds the batches of a run; iterating gives `Batches`.

    Attributes:
      settings: What it was made from.
      survey: What is known of all rows.
    """

    def __init__(
        self,
        settings: DataSettings,
        tokenizer: Tokenizer,
        cfg: GemmaConfig,
        process_index: int = 0,
        process_count: int = 1,
    ):
        rows = settings.rows * (2 if settings.pairs else 1)
        if not 0 <= process_index < process_count or rows % process_count:
            raise ValueError(
                f"{rows} rows of a batch for process {process_index} of {process_count}; rows must "
                "be a multiple of the number of processes"
            )
        self.settings, self._pad_id = settings, tokenizer.pad_id
        self._reader = RowReader(settings, tokenizer, cfg)
        self.survey: Survey = survey(settings, self._reader)
        self._all_rows, self._packed = rows, settings.packing != "off"
        share = rows // process_count
        self._own = slice(process_index * share, (process_index + 1) * share)

    def __len__(self) -> int:
        """Batches of the whole run; ValueError if it has no end."""
        if self.settings.epochs is None:
            raise ValueError("data for ever have no length (epochs is None)")
        return -(-self.settings.epochs * len(self.survey.layout) // self.settings.rows)

    @property
    def batches_per_epoch(self) -> float:
        """How many batches read everything once."""
        return len(self.survey.layout) / self.settings.rows

    def __iter__(self) -> "Batches":
        return Batches(self)

    def batch(self, number: int) -> TrainBatch | PreferenceBatch:
        """The batch of a number, as iterating gives it; this process' rows of it."""
        specs = self._specs(self._numbers[number])[self._own]
        rows = assemble(
            [[self._document(entry, side) for entry, side in row] for row in specs],
            self.settings.tokens_per_row,
            pad_id=self._pad_id,
            packed=self._packed,
            modalities=self._reader.modalities,
            most=self.survey.most,
            shapes=self.survey.shapes,
            first_row=self._own.start,
            all_rows=self._all_rows,
        )
        return PreferenceBatch(rows, self._reference(specs)) if self.settings.pairs else rows

    def _reference(self, specs: list[list[tuple[int, int]]]) -> np.ndarray | None:
        """`PreferenceBatch.reference_logps_B`: of rows, or of the documents in them by number."""
        entries = self.survey.entries
        if entries[0].reference_logps is None:
            return None
        logps_BE = np.zeros((len(specs), self.settings.tokens_per_row + 1), np.float32)
        for b, row in enumerate(specs):
            for number, (entry, side) in enumerate(row, 1):
                logps_BE[b, number] = entries[entry].reference_logps[side]
        return logps_BE if self._packed else logps_BE[:, 1]

    def batch_ids(self, number: int) -> list[tuple[str, ...]]:
        """`file:line` of every document in each row of a batch, of all processes."""
        specs = self._specs(self._numbers[number])
        return [tuple(str(self.survey.entries[e].place) for e, _ in row) for row in specs]

    def _specs(self, rows: np.ndarray) -> list[list[tuple[int, int]]]:
        """Entry and side of every document of all rows; rows of nothing fill up the last batch."""
        laid_out = [self.survey.layout[row] for row in rows]
        laid_out += [[]] * (self.settings.rows - len(laid_out))
        sides = (0, 1) if self.settings.pairs else (0,)
        return [[(entry, side) for entry in row] for side in sides for row in laid_out]

    def _document(self, entry: int, side: int) -> Document:
        return self._reader.read(self.survey.entries[entry])[side]

    @cached_property
    def _numbers(self) -> Any:
        """Grain's: number of a batch -> numbers of its rows."""
        settings = self.settings
        rows = _grain().MapDataset.range(len(self.survey.layout))
        if settings.shuffle:
            rows = rows.shuffle(seed=settings.seed * _SPREAD % 2**32)
        # For ever: Grain's own end of it is too large for `len` after batches of one row.
        epochs = settings.epochs or sys.maxsize // (2 * len(rows))
        return rows.repeat(epochs).batch(settings.rows)

    @cached_property
    def batches(self) -> Any:
        """Grain's `MapDataset` of the batches."""
        return _grain().MapDataset.range(len(self._numbers)).map(self.batch)


class Batches(Iterator[TrainBatch | PreferenceBatch]):
    """Gives one batch after the other; its state is a few numbers.

    Whoever goes on from a state gets the batches that would have come, bit for bit.
    """

    def __init__(self, data: Data):
        grain, threads = _grain(), data.settings.threads
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD * threads)
        self._data, self._next = data, 0
        self._batches = iter(data.batches.to_iter_dataset(options))

    def __next__(self) -> TrainBatch:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except Exception:
            # Grain has passed over what failed without counting it: stay where we are.
            self._batches.set_state({"next_index": self._next})
            raise
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Where it stands: integers, to be saved in any form."""
        return {"next_batch": self._next, "fingerprint": self._data.survey.fingerprint}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from there.

        Raises:
          ValueError: The state is of other files or settings, or lies behind the end.
        """
        number, fingerprint = (int(state[name]) for name in ("next_batch", "fingerprint"))
        if fingerprint != self._data.survey.fingerprint:
            raise ValueError(
                "the run was begun with other data: files, tokenizer or data settings have changed "
                "since; put them back, or begin a new run"
            )
        if not 0 <= number <= len(self._data.batches):
            raise ValueError(f"batch {number} lies behind the end, {len(self._data.batches)}")
        self._batches.set_state({"next_index": number})
        self._next = number

    def batch_ids(self) -> list[tuple[str, ...]]:
        """`file:line` of every document in each row of the batch that came last.

        Raises:
          ValueError: None has come.
        """
        if not self._next:
            raise ValueError("no batch has been read yet")
        return self._data.batch_ids(self._next - 1)

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._batches.close()


def _grain():
    """The module `grain`."""
    try:
        import grain
    except ImportError:
        raise ImportError('training data need Grain: pip install "gemma-jax[train]"') from None
    return grain
