"""GGUF files in parts, `NAME-00002-of-00003.gguf`, as `gguf-split` and gguf-py write large ones.

The first part has the metadata; the others have tensors alone, and the numbers `split.*`. llama.cpp
(`src/llama-model-loader.cpp`) wants to be given the first part; here any will do.
"""

import re
from pathlib import Path

from ..errors import CheckpointError
from .header import GGUFHeader, read_gguf_header

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def first_part(path: Path) -> Path:
    """The part that has the metadata, by its name; a file that is no part is its own first."""
    name = _NAME.fullmatch(path.name)
    if name is None:
        return path
    first = path.with_name(_part_name(name["stem"], 1, int(name["count"])))
    return first if first.is_file() else path


def read_parts(path: Path) -> dict[Path, GGUFHeader]:
    """The headers of all parts of the model that `path` is a part of, the first part first.

    Raises:
      CheckpointError: parts are missing, or do not belong together.
    """
    header = read_gguf_header(path)
    count = header.metadata.get("split.count", 1)
    number = header.metadata.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int):
        raise CheckpointError(path, f"split.no {number!r} of split.count {count!r} is no part")
    if count in (0, 1):
        return {path: header}
    name = _NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        expected = _part_name("NAME", number + 1, count)
        raise CheckpointError(
            path, f"is a part of a model in {count} parts; expected it to be called {expected}"
        )
    paths = [path.with_name(_part_name(name["stem"], i + 1, count)) for i in range(count)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise CheckpointError(
            path,
            [f"{name} is missing: all {count} parts must lie in one folder" for name in missing],
        )
    headers = {part: header if part == path else read_gguf_header(part) for part in paths}
    _check(path, headers)
    return headers


def _part_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05}-of-{count:05}.gguf"


def _check(path: Path, headers: dict[Path, GGUFHeader]) -> None:
    problems, seen = [], {}
    for i, (part, header) in enumerate(headers.items()):
        for key, expected in (("split.no", i), ("split.count", len(headers))):
            if (found := header.metadata.get(key)) != expected:
                problems.append(f"{part.name}: {key} is {found!r}; its name says {expected}")
        for name in header.tensors:
            if name in seen:
                problems.append(f"{name}: occurs in {seen[name]} and in {part.name}")
            seen[name] = part.name
    total = next(iter(headers.values())).metadata.get("split.tensors.count", len(seen))
    if not problems and total != len(seen):
        problems.append(f"the parts hold {len(seen)} tensors; the first one declares {total}")
    if problems:
        raise CheckpointError(path, problems)
