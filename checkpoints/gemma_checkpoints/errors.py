"""The one error of this room."""

import re
from collections.abc import Iterable

SHOWN = 8  # of each kind of problem: a wrong config makes every tensor wrong


class CheckpointError(ValueError):
    """Says why a checkpoint cannot be used: `where`, and everything that is wrong with it.

    Attributes:
      where: The file or folder.
      problems: One line each: what was expected, what was found, what to do.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.describe("README.md")
      Traceback (most recent call last):
      gemma_checkpoints.errors.CheckpointError: README.md: not a checkpoint: expected ...
    """

    def __init__(self, where: object, problems: str | Iterable[str]):
        self.where = str(where)
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self._message())

    def _message(self) -> str:
        if len(self.problems) == 1:
            return f"{self.where}: {self.problems[0]}"
        lines = [f"{self.where}: {len(self.problems)} problems", *self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"and {len(self.problems) - SHOWN} more")
        return "\n  ".join(lines)


def by_layer(lines: Iterable[str]) -> list[str]:
    """Lines that differ in their layer alone become one, with their number."""
    groups: dict[str, list[str]] = {}
    for line in lines:
        groups.setdefault(re.sub(r"blocks\.\d+", "blocks", line), []).append(line)
    return [
        first + (f" (and {len(more)} more layers)" if more else "")
        for first, *more in groups.values()
    ]
