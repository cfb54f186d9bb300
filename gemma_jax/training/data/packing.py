"""Which examples share a row.

Known before a run begins, from lengths alone: so a run's rows are a table, any of which can be read
at any time, by any process.

Local letters: I examples; M kinds of items that come with them, such as images.
"""

import numpy as np

METHODS = ("off", "in_order", "first_fit", "best_fit")
OPEN_ROWS = 4096  # that are looked through for room; beyond, the fullest one is closed


def pack(
    lengths_I: np.ndarray,
    items_IM: np.ndarray,
    tokens_per_row: int,
    most_M: np.ndarray,
    method: str,
) -> list[list[int]]:
    """The rows: which examples each holds, in their order.

    Args:
      lengths_I: Tokens of each example, none more than `tokens_per_row`.
      items_IM: Items of each, none more than `most_M`, which is a row's limit.
      method: See `DataSettings.packing`.

    Examples:
      >>> lengths, none = np.array([3, 5, 4, 2]), np.zeros((4, 0), int)
      >>> pack(lengths, none, 8, np.zeros(0, int), "in_order")
      [[0, 1], [2, 3]]
      >>> pack(lengths, none, 7, np.zeros(0, int), "best_fit")
      [[1, 3], [2, 0]]
    """
    if method == "off":
        return [[i] for i in range(len(lengths_I))]
    order = range(len(lengths_I))
    if method == "best_fit":
        order = np.argsort(-lengths_I, kind="stable")
    sizes = np.concatenate([lengths_I[:, None], items_IM], axis=1)
    room = _Room(np.array([tokens_per_row, *most_M]), 1 if method == "in_order" else OPEN_ROWS)
    rows: list[list[int]] = []
    for i in order:
        slot = room.find(sizes[i], best=method == "best_fit")
        if slot is None:
            slot = room.open(len(rows))
            rows.append([])
        rows[room.row[slot]].append(int(i))
        room.left[slot] -= sizes[i]
    return rows


class _Room:
    """What is left in the rows that are open."""

    def __init__(self, capacity: np.ndarray, most_open: int):
        self.capacity, self.most_open = capacity, most_open
        self.left = np.zeros((0, len(capacity)), np.int64)
        self.row = np.zeros(0, np.int64)

    def find(self, size: np.ndarray, *, best: bool) -> int | None:
        """The open row with the least room that suffices, or the first."""
        fits = np.flatnonzero((self.left >= size).all(axis=1))
        if not len(fits):
            return None
        return int(fits[np.argmin(self.left[fits, 0])] if best else fits[0])

    def open(self, row: int) -> int:
        """A new row; its place among the open ones, which are in the order of their opening."""
        if len(self.row) == self.most_open:
            fullest = np.argmin(self.left[:, 0])
            self.left = np.delete(self.left, fullest, axis=0)
            self.row = np.delete(self.row, fullest)
        self.left = np.concatenate([self.left, self.capacity[None]])
        self.row = np.append(self.row, row)
        return len(self.row) - 1
