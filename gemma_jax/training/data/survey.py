"""Everything is read once before a run: what cannot be used is said then, and rows are laid out.

Local letters: I examples; M kinds of items that come with them, such as images.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.multimodal.modality import Modality, modalities_of
from gemma_jax.text import Tokenizer
from gemma_jax.training.data.documents import Document, DocumentReader
from gemma_jax.training.data.examples import examples_of, reference_logps_of
from gemma_jax.training.data.files import Place, bad_rows_message, find_files, lines_of, parse
from gemma_jax.training.data.packing import pack
from gemma_jax.training.data.settings import DataSettings


@dataclass(frozen=True, slots=True)
class Entry:
    """Describes the documents of one row of a file: one, or chosen and rejected.

    Attributes:
      lengths, trained: Tokens of each document, and how many of them are trained.
      items: Name of a modality -> most items in one document.
      shapes: Name of a modality -> the largest shape of what its encoder reads.
      was_cut: Whether tokens were cut off.
      checksum: Of the row's bytes.
      reference_logps: Of a pair; see `examples`.
    """

    place: Place
    lengths: tuple[int, ...]
    trained: tuple[int, ...]
    items: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    was_cut: bool
    checksum: int
    reference_logps: tuple[float, float] | None


class RowReader:
    """Reads the documents of one row, by what the settings say."""

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, cfg: GemmaConfig):
        self.settings, self.cfg = settings, cfg
        self.modalities: Sequence[Modality] = modalities_of(cfg, pan_and_scan=settings.pan_and_scan)
        self._documents = DocumentReader(
            tokenizer,
            self.modalities,
            train_on=settings.train_on,
            end_of_text=settings.end_of_text,
        )

    def whole(self, place: Place, line: bytes) -> tuple[Document, ...]:
        """The documents, however long.

        Raises:
          ValueError: The row cannot be used.
        """
        examples = examples_of(
            parse(line),
            place.path.parent,
            pairs=self.settings.pairs,
            ignore=self.settings.ignore,
        )
        try:
            return tuple(self._documents.read(example) for example in examples)
        except OSError as error:
            named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            raise ValueError(named) from None

    def read(self, entry: Entry) -> tuple[Document, ...]:
        """The documents of a row that was there before.

        Raises:
          ValueError: The file has changed since.
        """
        try:
            line = entry.place.read()
            documents = self.whole(entry.place, line)
        except (ValueError, OSError) as error:
            raise ValueError(f"{entry.place} cannot be read any more: {error}") from None
        documents = tuple(d.cut(self.settings.tokens_per_row) for d in documents)
        lengths = tuple(len(document.ids) for document in documents)
        if zlib.crc32(line) != entry.checksum or lengths != entry.lengths:
            raise ValueError(f"{entry.place} has changed since the run began; begin it anew")
        return documents


@dataclass(frozen=True)
class Survey:
    """Holds what is known of all rows.

    Attributes:
      entries: Rows that are used, in the order of the files.
      layout: Which of them share a row of a batch.
      bad: Rows that are not used, with the reason.
      dropped: Rows that are longer than a row of a batch, and left out.
      most: Name of a modality -> items that every row of a batch has room for, those that occur.
      shapes: Name of a modality -> shape of what its encoder reads of one item.
      fingerprint: Of rows and settings: the same numbers mean the same batches.
    """

    entries: Sequence[Entry]
    layout: Sequence[Sequence[int]]
    bad: Sequence[tuple[Place, str]]
    dropped: Sequence[Place]
    most: dict[str, int]
    shapes: dict[str, tuple[int, ...]]
    fingerprint: int


def survey(settings: DataSettings, reader: RowReader) -> Survey:
    """Reads all files.

    Raises:
      ValueError: Rows that cannot be used, if none may be skipped; or no row that can.
    """
    entries, bad, dropped, digest = [], [], [], 0
    for place, line in _lines(settings):
        digest = zlib.crc32(line, digest)
        try:
            entry = _entry(settings, reader, place, line)
        except ValueError as error:
            bad.append((place, str(error)))
            continue
        if entry is None:
            dropped.append(place)
        else:
            entries.append(entry)
    rows = len(entries) + len(bad) + len(dropped)
    if bad and (settings.on_bad_row == "refuse" or not entries):
        raise ValueError(bad_rows_message(bad, rows))
    if not entries:
        raise ValueError(f"no row to train on in {', '.join(settings.files)} ({rows} rows)")
    known = sum(entry.reference_logps is not None for entry in entries)
    if known not in (0, len(entries)):
        raise ValueError(f"{known} of {len(entries)} rows have log-probabilities of a reference")
    names = [m.name for m in reader.modalities if any(m.name in e.items for e in entries)]
    layout, most = _lay_out(settings, entries, names)
    shapes = {n: _largest([e.shapes[n] for e in entries if n in e.shapes]) for n in names}
    lengths = np.array([e.lengths for e in entries], np.int64)
    laid_out = (lengths.tolist(), [list(row) for row in layout], _meaning(settings))
    digest = zlib.crc32(repr(laid_out).encode(), digest) % 2**31
    return Survey(entries, layout, bad, dropped, most, shapes, digest)


def _lines(settings: DataSettings) -> Iterator[tuple[Place, bytes]]:
    for path in find_files(settings.files):
        yield from lines_of(path)


def _entry(settings: DataSettings, reader: RowReader, place: Place, line: bytes) -> Entry | None:
    documents, most = reader.whole(place, line), settings.tokens_per_row
    longest = max(len(document.ids) for document in documents)
    if longest > most and settings.too_long != "cut":
        if settings.too_long == "drop":
            return None
        raise ValueError(f"{longest} tokens in rows of {most}; cut or drop it (too_long)")
    documents = tuple(document.cut(most) for document in documents)
    if not all(document.trained.any() for document in documents):
        return None  # nothing to train on is left
    items, shapes = {}, {}
    for name in {run.modality for document in documents for run in document.runs}:
        items[name] = max(document.count(name) for document in documents)
        shapes[name] = _largest(
            [run.values.shape for d in documents for run in d.runs if run.modality == name]
        )
        if (limit := settings.most(name)) is not None and items[name] > limit:
            raise ValueError(f"{items[name]} items of {name}, where a row has room for {limit}")
    return Entry(
        place=place,
        lengths=tuple(len(document.ids) for document in documents),
        trained=tuple(int(document.trained.sum()) for document in documents),
        items=items,
        shapes=shapes,
        was_cut=longest > most,
        checksum=zlib.crc32(line),
        reference_logps=reference_logps_of(parse(line)) if settings.pairs else None,
    )


def _lay_out(
    settings: DataSettings, entries: Sequence[Entry], names: Sequence[str]
) -> tuple[list[list[int]], dict[str, int]]:
    """Rows of entries, and the room that each needs for items."""
    lengths_I = np.array([max(entry.lengths) for entry in entries])
    items_IM = np.array([[e.items.get(n, 0) for n in names] for e in entries], np.int64)
    items_IM = items_IM.reshape(len(entries), len(names))
    no_limit = int(items_IM.sum()) + 1
    limits = [settings.most(name) for name in names]
    limits_M = np.array([no_limit if x is None else x for x in limits], np.int64)
    order = np.arange(len(entries))
    if settings.shuffle:
        order = np.random.default_rng(settings.seed).permutation(order)
    rows = pack(
        lengths_I[order], items_IM[order], settings.tokens_per_row, limits_M, settings.packing
    )
    layout = [[int(order[i]) for i in row] for row in rows]
    needed = np.max([items_IM[row].sum(axis=0) for row in layout], axis=0)
    return layout, {name: int(count) for name, count in zip(names, needed)}


def _largest(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(int(size) for size in np.max(np.array(shapes), axis=0))


def _meaning(settings: DataSettings) -> list[object]:
    """What of the settings, beside lengths, decides what is in the batch of a number."""
    order = [settings.rows, settings.tokens_per_row, settings.shuffle, settings.seed]
    return [*order, settings.pairs, settings.packing, settings.train_on, settings.end_of_text]
