"""What a run will read, in numbers, before it begins."""

from dataclasses import asdict, dataclass

from gemma_jax.config import GemmaConfig
from gemma_jax.text import Tokenizer
from gemma_jax.training.data.files import bad_rows_message
from gemma_jax.training.data.settings import DataSettings
from gemma_jax.training.data.survey import RowReader, Survey, survey

_LONGEST = 5


@dataclass(frozen=True)
class DataReport:
    """Holds what is known of the data of a run.

    Attributes:
      examples: Rows of files that are used (with pairs, two documents each).
      tokens, trained_tokens: Of all documents, after cutting, read once.
      rows: Rows of batches that hold everything once.
      padding, padding_unpacked: Share of the places of these rows that hold no token; and were
        every document in a row of its own.
      batches_per_epoch: Batches that hold everything once.
      items: Name of a modality -> items.
      item_room: Name of a modality -> items that each row of a batch has room for.
      blank_items: Share of that room that is encoded for nothing.
      longest: The longest documents: `(file:line, tokens)`.
      cut, dropped: Examples that were too long.
      bad: Rows of files that cannot be used and are skipped, and `bad_rows` which and why.
    """

    examples: int
    tokens: int
    trained_tokens: int
    rows: int
    padding: float
    padding_unpacked: float
    batches_per_epoch: float
    items: dict[str, int]
    item_room: dict[str, int]
    blank_items: float
    longest: list[tuple[str, int]]
    cut: int
    dropped: int
    bad: int
    bad_rows: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [
            f"{self.examples:,} examples, {self.tokens:,} tokens, {self.trained_tokens:,} trained",
            f"{self.rows:,} rows in {self.batches_per_epoch:,.1f} batches, {self.padding:.0%} "
            f"padding ({self.padding_unpacked:.0%} with an example per row)",
        ]
        if self.items:
            counts = ", ".join(f"{count:,} of {name}" for name, count in self.items.items())
            room = ", ".join(f"{count} of {name}" for name, count in self.item_room.items())
            lines.append(f"{counts}; room for {room} in a row, {self.blank_items:.0%} of it blank")
        lines.append("longest: " + ", ".join(f"{n:,} tokens ({row})" for row, n in self.longest))
        if self.cut or self.dropped:
            lines.append(f"too long: {self.cut:,} cut, {self.dropped:,} dropped")
        if self.bad:
            lines.append(self.bad_rows)
        return "\n".join(lines)


def describe(settings: DataSettings, tokenizer: Tokenizer, cfg: GemmaConfig) -> DataReport:
    """Counts what a run of these settings would read; needs no Grain.

    Raises:
      ValueError: As `make_data` does.

    Examples:
      >>> import json, tempfile, pathlib
      >>> import gemma_jax as gj
      >>> file = pathlib.Path(tempfile.mkdtemp()) / "texts.jsonl"
      >>> _ = file.write_text("\\n".join(json.dumps({"text": "Hi " * n}) for n in (1, 5, 3)))
      >>> tok = gj.load_tokenizer("checkpoints/elastic")
      >>> cfg = gj.load_model("checkpoints/elastic").cfg
      >>> settings = gj.DataSettings(files=str(file), tokens_per_row=64, rows=1)
      >>> report = gj.describe(settings, tok, cfg)
      >>> report.examples, report.rows
      (3, 1)
    """
    return report_of(settings, survey(settings, RowReader(settings, tokenizer, cfg)))


def report_of(settings: DataSettings, known: Survey) -> DataReport:
    """The numbers of a survey that has been made."""
    entries, places = known.entries, settings.tokens_per_row
    documents = [(str(e.place), length) for e in entries for length in e.lengths]
    tokens = sum(length for _, length in documents)
    sides = 2 if settings.pairs else 1
    rows = len(known.layout) * sides
    items = {name: sum(e.items.get(name, 0) for e in entries) * sides for name in known.most}
    room = sum(known.most.values()) * rows
    all_rows = len(entries) + len(known.bad) + len(known.dropped)
    return DataReport(
        examples=len(entries),
        tokens=tokens,
        trained_tokens=sum(sum(entry.trained) for entry in entries),
        rows=rows,
        padding=1 - tokens / (rows * places),
        padding_unpacked=1 - tokens / (len(documents) * places),
        batches_per_epoch=len(known.layout) / settings.rows,
        items=items,
        item_room=dict(known.most),
        blank_items=1 - sum(items.values()) / room if room else 0.0,
        longest=sorted(documents, key=lambda one: -one[1])[:_LONGEST],
        cut=sum(entry.was_cut for entry in entries),
        dropped=len(known.dropped),
        bad=len(known.bad),
        bad_rows=bad_rows_message(known.bad, all_rows) if known.bad else "",
    )
