"""Files of JSON Lines: which they are, and their rows."""

import glob
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".jsonl"
NAMED = 5  # bad rows that an error names; the rest is counted


@dataclass(frozen=True, slots=True)
class Place:
    """Says where a row is.

    Attributes:
      number: Of its line, from 1.
      offset, size: Of its bytes.
    """

    path: Path
    number: int
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.path}:{self.number}"

    def read(self) -> bytes:
        """The row again."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def find_files(names: Sequence[str]) -> list[Path]:
    """The files that names, folders and patterns stand for, in a fixed order.

    Raises:
      ValueError: One that is not there, stands for nothing or is no JSON Lines, or a file that is
        named twice.
    """
    found = [path for name in names for path in _files(name)]
    seen: set[str] = set()
    for path in found:
        if (real := os.path.realpath(path)) in seen:
            raise ValueError(f"{path} is named twice; name every file once")
        seen.add(real)
    return found


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(path.rglob(f"*{SUFFIX}"))
        if not files:
            raise ValueError(f"{name}: expected files *{SUFFIX} in this folder, found none")
        return files
    if not path.exists() and glob.has_magic(name):
        files = [Path(one) for one in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise ValueError(f"{name}: no file has such a name")
        return [file for one in files for file in _files(str(one))]
    if not path.exists():
        raise ValueError(f"{name}: there is no such file")
    if path.suffix != SUFFIX:
        raise ValueError(f"{name}: expected a file of JSON Lines, *{SUFFIX}")
    return [path]


def lines_of(path: Path) -> Iterator[tuple[Place, bytes]]:
    """The rows of a file; lines with nothing but spaces are none.

    Raises:
      ValueError: The file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield Place(path, number, offset, len(line)), line
                offset += len(line)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def parse(line: bytes) -> dict[str, object]:
    """A row's keys and values; what is null counts as not there.

    Raises:
      ValueError: It is no JSON object in UTF-8, or has a key twice.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise ValueError("lists in lists beyond what can be read") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object {{...}}, got {type(row).__name__}")
    return row


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    kept = {key: value for key, value in pairs if value is not None}
    if len({key for key, _ in pairs}) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return kept


def bad_rows_message(bad: Sequence[tuple[Place, str]], rows: int) -> str:
    """One line that names the first bad rows of a run's and counts the others."""
    named = "; ".join(f"{place}: {reason}" for place, reason in bad[:NAMED])
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    return f"{len(bad)} of {rows} rows cannot be used: {named}{more}"
