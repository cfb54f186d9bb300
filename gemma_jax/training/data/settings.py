"""What is read for training, and how."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from gemma_jax.field_types import check_positive, check_types
from gemma_jax.training.data.packing import METHODS


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Says which examples a run reads, and how they become batches.

    Attributes:
      files: Files of JSON Lines, folders (their `*.jsonl`, also in folders inside) and patterns
        with `*`; one string is a tuple of one. See `training.data.examples` for what rows are.
      tokens_per_row: Places of a row, padding included.
      rows: Rows of a batch, over all processes; with `pairs`, pairs of a batch.
      pairs: Rows are preferences: one answer that is chosen, one that is rejected. Batches are
        `PreferenceBatch`es.
      packing: How examples share rows: `"best_fit"` (the longest first, each where it leaves least
        room), `"first_fit"` (in their order, each into the first row with room), `"in_order"` (a
        row ends where the next one does not fit) or `"off"`. Nobody sees another example.
      shuffle: Draw the order of rows, anew in each epoch. Examples that share a row stay together.
      seed: Of that order.
      epochs: How often everything is read; `None` for ever.
      train_on: What the loss counts of a conversation: each of the `"answers"`, the
        `"last_answer"`, or `"all"` tokens but <bos> and those of images and sounds. Of a prompt
        with a completion: the completion, or `"all"`. Of a text: always all.
      end_of_text: Whether <eos> follows a text or completion, and is trained. Conversations end
        with the end of a turn.
      too_long: What to do with an example of more than `tokens_per_row` tokens: `"refuse"` it,
        `"cut"` off its end (in front of an image that would be cut), or `"drop"` it.
      on_bad_row: Whether a row that cannot be used is an error (`"refuse"`) or left out and counted
        (`"skip"`).
      ignore: Keys in rows, messages and their items that need not be understood.
      max_images, max_sounds: Most in one row. A batch has room for `rows` times as many, all of
        which are encoded. `None`: what the examples need.
      pan_and_scan: Whether images that are far from square come with crops; `None`: as the
        checkpoint says.
      threads: That prepare batches ahead of the run; 0: none.

    Raises:
      ValueError: A field of a wrong type or value.

    Examples:
      >>> import gemma_jax as gj
      >>> settings = gj.DataSettings(files="chats/*.jsonl", tokens_per_row=512, rows=8)
      >>> settings.files, settings.packing
      (('chats/*.jsonl',), 'best_fit')
      >>> settings.held_out("held_out.jsonl").shuffle
      False
    """

    files: tuple[str, ...]
    tokens_per_row: int
    rows: int
    pairs: bool = False
    packing: str = "best_fit"
    shuffle: bool = True
    seed: int = 0
    epochs: int | None = 1
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    end_of_text: bool = True
    too_long: Literal["refuse", "cut", "drop"] = "refuse"
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    ignore: tuple[str, ...] = ()
    max_images: int | None = None
    max_sounds: int | None = None
    pan_and_scan: bool | None = None
    threads: int = 2

    def __post_init__(self):
        for name in ("files", "ignore"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, (value,))
        check_types(self)
        check_positive(self, "tokens_per_row", "rows")
        self._check()

    def _check(self):
        if not self.files:
            raise ValueError("files is empty; name at least one file of JSON Lines")
        if self.packing not in METHODS:
            raise ValueError(f"packing={self.packing!r} must be one of {', '.join(METHODS)}")
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be at least 1, or None for no end")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must lie in [0, 2**32)")
        for name in ("max_images", "max_sounds", "threads"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name}={value} must not be negative")

    def held_out(self, files: tuple[str, ...] | str) -> "DataSettings":
        """The same for files that are not trained on: read once, in their order."""
        return dataclasses.replace(self, files=files, shuffle=False, epochs=1)

    def most(self, modality: str) -> int | None:
        """Most items of a modality in one row; `None` for no limit."""
        return {"image": self.max_images, "audio": self.max_sounds}.get(modality)
