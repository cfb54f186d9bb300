"""A Hugging Face folder as a source: `config.json` and one or more safetensors files."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from gemma_jax.config import GemmaConfig

from ..errors import CheckpointError
from ..name_table import Table
from ..safetensors_file import SafetensorsFile
from ..source import TensorInfo
from .config import config_from_hf
from .names import hf_table, short_name

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@dataclass
class HFFolder:
    """See `Source`. Names are those of the tables: what stands in front of them is taken off.

    Attributes:
      raw_config: `config.json` as it is.
    """

    path: Path
    raw_config: dict = field(init=False)
    config: GemmaConfig = field(init=False)
    table: Table = field(init=False)
    tensors: dict[str, TensorInfo] = field(init=False)
    format = "Hugging Face"
    reads_rows = True

    def __post_init__(self):
        self.raw_config = read_json(self.path / CONFIG)
        try:
            self.config = config_from_hf(self.raw_config)
        except ValueError as error:
            raise CheckpointError(self.path / CONFIG, str(error)) from None
        self.table = hf_table(self.config)
        self._open(self._files())

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        file, theirs = self._where[name]
        return file.read(theirs, rows, columns)

    def mapped(self, name: str) -> np.ndarray:
        """One tensor, mapped into memory and not read."""
        file, theirs = self._where[name]
        return file.mapped(theirs)

    @property
    def spellings(self) -> dict[str, str]:
        """Name as in the table -> name in the files."""
        return {name: theirs for name, (_, theirs) in self._where.items()}

    def _files(self) -> Mapping[str, Iterable[str] | None]:
        """File -> names that the index expects in it; `None` without an index."""
        if not (self.path / INDEX).exists():
            return {SINGLE: None}
        files: dict[str, list[str]] = {}
        index = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(self.path / INDEX, "expected a weight_map from names to files")
        for name, file in index.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(self.path / INDEX, f"{name}: {file!r} is not a file name")
            files.setdefault(file, []).append(name)
        return files

    def _open(self, files: Mapping[str, Iterable[str] | None]) -> None:
        problems, self.tensors, self._where = [], {}, {}
        for file_name, expected in files.items():
            if not (self.path / file_name).is_file():
                problems.append(f"{file_name} is missing; expected safetensors beside {CONFIG}")
                continue
            try:
                file = SafetensorsFile(self.path / file_name)
            except CheckpointError as error:
                problems += [f"{file_name}: {problem}" for problem in error.problems]
                continue
            missing = sorted(set(expected or ()) - set(file.tensors))
            problems += [f"{name}: in the index, but not in {file_name}" for name in missing]
            problems += self._add(file)
        if problems:
            raise CheckpointError(self.path, problems)

    def _add(self, file: SafetensorsFile) -> list[str]:
        problems = []
        for theirs, info in file.tensors.items():
            name = short_name(theirs)
            if name in self.tensors:
                problems.append(f"{theirs}: occurs twice, also in {self._where[name][0].path.name}")
            self.tensors[name], self._where[name] = info, (file, theirs)
        return problems


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      CheckpointError: no such file, or something else in it.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(path, "no such file") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(path, f"expected a JSON object, got {type(value).__name__}")
    return value
