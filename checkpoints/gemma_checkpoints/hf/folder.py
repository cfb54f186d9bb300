"""A Hugging Face folder as a source: `config.json` and one or more safetensors files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from gemma_jax.config import GemmaConfig

from ..blocks import Blocks
from ..errors import CheckpointError
from ..heads import is_tied
from ..json_values import read_json
from ..name_table import Table
from ..safetensors_file import SafetensorsFile
from ..source import TensorInfo
from .config import TOWERS, config_from_hf
from .names import DENSE, EMBEDDING, HEAD, UNREAD_TOWER, hf_table, short_name
from .processor_config import with_processor
from .quantised import QuantisedMatrix, quantised_matrices, split_quantisation
from .sentence_folder import read_sentence_folder

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


@dataclass
class HFFolder:
    """See `Source`. Names are those of the tables: what stands in front of them is taken off.

    Attributes:
      raw_config: `config.json`, but for what it says of quantised weights.
      notes: Lines on what a quantised folder asks for and is not done here.
      spoilt: Modality -> why, where the files beside the weights say nothing sound of it.
    """

    path: Path
    raw_config: dict = field(init=False)
    notes: list[str] = field(init=False, default_factory=list)
    config: GemmaConfig = field(init=False)
    table: Table = field(init=False)
    tensors: dict[str, TensorInfo] = field(init=False)
    spoilt: dict[str, str] = field(init=False)
    beside_config = None
    format = "Hugging Face"
    reads_rows = True

    def __post_init__(self):
        self.raw_config, quantisation = split_quantisation(read_json(self.path / CONFIG))
        self.spoilt = {}
        try:
            self.config = config_from_hf(self.raw_config, modalities=())
        except ValueError as error:
            raise CheckpointError(self.path / CONFIG, str(error)) from None
        for modality in TOWERS:  # it may not be wanted
            try:
                self._read_config(modality)
            except CheckpointError as error:
                problem = "; ".join(error.problems)
                self.spoilt[modality] = f"{Path(error.where).name}: {problem}"
            except ValueError as error:
                self.spoilt[modality] = f"{CONFIG}: {error}"
        if len(self.spoilt) < len(TOWERS):
            self.config = self._read_config(*(one for one in TOWERS if one not in self.spoilt))
        sentence = read_sentence_folder(self.path, self.config.d_model)
        self._matrices: Mapping[str, QuantisedMatrix] = {}
        self._open(self._files())
        if sentence is not None:
            head, folders = sentence
            self.config = replace(self.config, text_embedding=head)
            self._open_dense(folders)
        if quantisation is not None:
            self._join_matrices(quantisation)
        self.config = replace(self.config, tied_head=self._has_tied_head())
        self.table = hf_table(self.config) + (UNREAD_TOWER if "image" in self.spoilt else ())

    def _read_config(self, *modalities: str) -> GemmaConfig:
        return with_processor(config_from_hf(self.raw_config, modalities=modalities), self.path)

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        if name in self._matrices:
            return self._matrices[name].values(rows)[:, columns]
        return self._read_part(name, rows, columns)

    def read_blocks(self, name: str, rows: slice = slice(None)) -> Blocks:
        return self._matrices[name].blocks(rows)

    def _read_part(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        file, theirs = self._where[name]
        return file.read(theirs, rows, columns)

    def _join_matrices(self, said: object) -> None:
        """Puts each quantised matrix in the place of the tensors that it is made of."""
        try:
            self._matrices, self.notes = quantised_matrices(
                said, self.tensors, self.spellings, self._read_part
            )
        except ValueError as error:
            raise CheckpointError(self.path, list(error.args)) from None
        parts = {part for matrix in self._matrices.values() for part in matrix.parts}
        plain = {name: info for name, info in self.tensors.items() if name not in parts}
        self.tensors = plain | {name: matrix.info for name, matrix in self._matrices.items()}

    def mapped(self, name: str) -> np.ndarray:
        """One tensor, mapped into memory and not read."""
        if name in self._matrices:
            raise CheckpointError(
                self.path, f"{name} is quantised in several tensors, and cannot stay on disk"
            )
        file, theirs = self._where[name]
        return file.mapped(theirs)

    @property
    def spellings(self) -> dict[str, str]:
        """Name as in the table -> name in the files, or the one that a plain tensor would have."""
        parts = {name: theirs for name, (_, theirs) in self._where.items()}
        joined = {
            name: parts[matrix.parts[0]].removesuffix("_packed")
            for name, matrix in self._matrices.items()
        }
        return parts | joined

    def _has_tied_head(self) -> bool:
        """What is stored says it; see `heads`. One table under the name of either serves as both
        (`tie_weights` of transformers does the same)."""
        declared = self.config.tied_head
        if HEAD in self.tensors and EMBEDDING not in self.tensors and declared:
            self.tensors[EMBEDDING], self._where[EMBEDDING] = (
                self.tensors.pop(HEAD), self._where.pop(HEAD)
            )  # fmt: skip
        if HEAD in self.tensors or declared:
            return is_tied(self.read, self.tensors, EMBEDDING, HEAD)
        raise CheckpointError(
            self.path,
            f"tie_word_embeddings is false, but no file holds {HEAD}: add it, or set "
            f"tie_word_embeddings to true in {CONFIG} if the embedding is the head",
        )

    def _files(self) -> Iterable[str]:
        """As transformers (5.24, `modeling_utils._get_resolved_checkpoint_files`) chooses them: the
        single file, else those that the index names. The names of tensors in the index count for
        nothing: it may list a tied head that no file has."""
        if (self.path / SINGLE).is_file():
            return [SINGLE]
        if not (self.path / INDEX).is_file():
            raise CheckpointError(self.path, self._without_weights())
        index = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise CheckpointError(self.path / INDEX, "expected a weight_map from names to files")
        for name, file in index.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise CheckpointError(self.path / INDEX, f"{name}: {file!r} is not a file name")
        return dict.fromkeys(index.values())

    def _without_weights(self) -> str:
        found = sorted(
            path.name
            for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth")
            for path in self.path.glob(pattern)
        )
        beside = f"; {', '.join(found[:3])} is not read without an index" if found else ""
        return f"{SINGLE} is missing; expected it or {INDEX} beside {CONFIG}{beside}"

    def _open(self, files: Iterable[str]) -> None:
        problems, self.tensors, self._where = [], {}, {}
        for file_name in files:
            if not (self.path / file_name).is_file():
                problems.append(f"{file_name} is missing: {INDEX} names it")
                continue
            try:
                file = SafetensorsFile(self.path / file_name)
            except CheckpointError as error:
                problems += [f"{file_name}: {problem}" for problem in error.problems]
                continue
            problems += self._add(file)
        if problems:
            raise CheckpointError(self.path, problems)

    def _open_dense(self, folders: list[Path]) -> None:
        """The tensors of dense layers, by the number of the layer."""
        for i, folder in enumerate(folders):
            if not (folder / SINGLE).is_file():
                raise CheckpointError(
                    folder / SINGLE, "no such file, and modules.json has a dense layer there"
                )
            file = SafetensorsFile(folder / SINGLE)
            for theirs, info in file.tensors.items():
                name = f"{DENSE}{i}.{theirs}"
                self.tensors[name], self._where[name] = info, (file, theirs)

    def _add(self, file: SafetensorsFile) -> list[str]:
        problems = []
        for theirs, info in file.tensors.items():
            name = short_name(theirs)
            if name in self.tensors:
                problems.append(f"{theirs}: occurs twice, also in {self._where[name][0].path.name}")
            self.tensors[name], self._where[name] = info, (file, theirs)
        return problems
