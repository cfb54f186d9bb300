"""Folders of ours: `gemma_jax.json` with the config, and one Orbax array per layer and parameter.

Names do not depend on how layers are stacked, so a folder loads into either layout.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma
from gemma_jax.weights.quantized import QuantizedWeight
from gemma_jax.weights.tree import flat_params
from gemma_kernels.quantized_matmul import QuantizedMatrix

from ..beside_config import noted_beside_config
from ..blocks import Blocks
from ..catalog import resolve
from ..errors import CheckpointError
from ..export import host_array, refuse_inexact, tensor_bytes
from ..folders import new_folder
from ..hf.names import hf_table
from ..hf.sentence_folder import MODULES
from ..json_values import read_json
from ..matching import Move
from ..name_table import Row, Table, expand
from ..params import depths, named_slots
from ..source import TensorInfo
from ..tokenizers import copy_companions
from .quantized import PARTS, Quantised, facts_in, for_manifest, to_save

MANIFEST, ARRAYS = "gemma_jax.json", "arrays"
VERSION, WITH_QUANTISED = 1, 2


def save_orbax(model: Gemma, folder: str | Path, *, source: str | Path | None = None) -> Path:
    """Saves `model` as a new Orbax folder, which appears whole or not at all.

    A model of `Gemma(cfg, block=...)` is loaded by `gemma_jax.load(folder, block=...)` again: what
    the modules of its blocks are called is noted, with their attributes that are numbers, text or
    functions, and another `block`, or none, is refused. Of classes and functions names are
    compared, not the code behind them: the same name in another notebook is taken for the same.

    A model on the devices of several processes is written by all of them, each its own shards; they
    must call this together, on one file system, and have room for a second copy of their shards.

    Args:
      model: Parameters in float32, float16, bfloat16, or quantised ones (`gemma_jax.quantisation`);
        they are stored as they are.
      folder: Must not exist, or be empty.
      source: Checkpoint whose tokenizer goes along, and settings of the images' processor.

    Raises:
      CheckpointError: the folder is taken, or cannot be written; or the model was changed after it
        was made, in a way that neither its config nor its `block` says; or its blocks keep a
        function without a name that leads to it, such as a lambda.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> import tempfile
      >>> model = gc.load_weights("checkpoints/digits")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     saved = gc.save_orbax(model, f"{folder}/copy", source="checkpoints/digits")
      ...     gc.describe(saved).format
      'Orbax'
    """
    import orbax.checkpoint as ocp

    target = Path(folder)
    params = flat_params(model)
    refuse_inexact(target, params, but=QuantizedWeight)
    noted = noted_beside_config(target, model)
    source = None if source is None else resolve(source)
    slots = named_slots(model)
    arrays, facts = {}, {}
    for name, slot in slots.items():
        value = params[slot.path].get_value()
        if isinstance(value, QuantizedWeight):
            facts[name], parts = to_save(value, slot.row)
            arrays |= {f"{name}:{part}": _on_host(array) for part, array in parts.items()}
        else:
            arrays[name] = _array(params[slot.path], slot.row)
    with new_folder(target, needed=tensor_bytes(params)) as part:
        if jax.process_index() == 0:
            version = WITH_QUANTISED if facts else VERSION
            manifest = {"version": version, "config": asdict(model.cfg), **for_manifest(facts)}
            manifest |= {"beside_config": noted} if noted else {}
            (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            if source is not None:
                copy_companions(source, part, processors=_has_towers(model.cfg))
                _keep_modules(model.cfg, source, part)
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save((part / ARRAYS).absolute(), arrays)
    return target


def _keep_modules(cfg: GemmaConfig, source: Path, folder: Path) -> None:
    """The file that says of a tokenizer that it is for embeddings, and may add <eos>."""
    if cfg.text_embedding is not None and (source / MODULES).is_file():
        shutil.copyfile(source / MODULES, folder / MODULES)


def _has_towers(cfg: GemmaConfig) -> bool:
    return cfg.vision is not None or cfg.audio is not None


def _array(param: nnx.Param, row: int | None) -> np.ndarray | jax.Array:
    """One layer's parameter, on the host if this process has all of it."""
    value = param.get_value()
    if value.is_fully_addressable:
        return host_array(param, row)
    return value if row is None else value[row]


def _on_host(array: jax.Array) -> np.ndarray | jax.Array:
    return np.asarray(array) if array.is_fully_addressable else array


@dataclass
class OrbaxFolder:
    """See `Source`. Arrays are read whole: `rows` selects afterwards."""

    path: Path
    config: GemmaConfig = field(init=False)
    table: Table = field(init=False)
    tensors: dict[str, TensorInfo] = field(init=False)
    quantised: dict[str, Quantised] = field(init=False)
    parts: dict[str, list[str]] = field(init=False)
    spoilt: dict[str, str] = field(init=False, default_factory=dict)
    beside_config: tuple[str, ...] = field(init=False)
    format = "Orbax"
    reads_rows = False
    notes = ()

    def __post_init__(self):
        manifest = read_json(self.path / MANIFEST)
        if (found := manifest.get("version")) not in (VERSION, WITH_QUANTISED):
            raise CheckpointError(
                self.path / MANIFEST, f"version {found!r}; expected {VERSION} or {WITH_QUANTISED}"
            )
        try:
            self.config = _restored(GemmaConfig, manifest["config"])
            self.beside_config = tuple(manifest.get("beside_config", ()))
            self.quantised = facts_in(manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(self.path / MANIFEST, f"broken config: {error}") from None
        stored = {name: _info(entry) for name, entry in self._metadata().items()}
        self.parts = {
            name: [part for part in PARTS if f"{name}:{part}" in stored] for name in self.quantised
        }
        infos = {
            name: TensorInfo(
                one.shape,
                one.encoding,
                np.dtype(np.float32),
                sum(stored.pop(f"{name}:{part}").nbytes for part in self.parts[name]),
            )
            for name, one in self.quantised.items()
        }
        self.tensors = stored | infos
        self.table = tuple(Row(r.ours, r.ours) for r in hf_table(self.config) if r.ours is not None)
        if self.beside_config:  # blocks of a user's own may have parameters of their own
            known = expand(self.table, depths(self.config))
            self.table += tuple(Row(name, name) for name in self.tensors if name not in known)

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        if name in self.quantised:
            array = np.asarray(self.matrix(name).dense()).reshape(self.tensors[name].shape)
        else:
            array = self._read(name)
        return array[rows] if array.ndim < 2 else array[rows, columns]

    def matrix(self, name: str) -> QuantizedMatrix:
        """A quantised parameter of one layer as it was saved, `[*outputs, I]`."""
        parts = {part: self._read(f"{name}:{part}") for part in self.parts[name]}
        try:
            return self.quantised[name].matrix(parts)
        except (KeyError, ValueError) as error:
            raise CheckpointError(self.path, f"{name}: {error}") from None

    def matrix_of(self, group: Sequence[Move]) -> QuantizedMatrix | None:
        """The matrix of a Param, whose layers are the tensors of `group`, as it was saved; `None`
        if they are not quantised, or not alike."""
        names = [move.row.theirs for move in group]
        first, *others = (self.quantised.get(name) for name in names)
        if first is None or any(other != first for other in others):
            return None
        if group[0].slot.row is None:
            return self.matrix(names[0])
        rows = sorted(zip((move.slot.row for move in group), names))
        layers = [self.matrix(name) for _, name in rows]
        return jax.tree.map(lambda *arrays: np.stack(arrays), *layers)

    def _read(self, name: str) -> np.ndarray:
        import orbax.checkpoint as ocp

        wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
        request = ocp.args.PyTreeRestore(item={name: 0}, restore_args=wanted, partial_restore=True)
        return self._orbax(lambda c, path: c.restore(path, args=request))[name]

    def read_blocks(self, name: str, rows: slice = slice(None)) -> Blocks:
        raise ValueError(f"{name}: an Orbax folder has no blocks")

    def _metadata(self) -> dict[str, Any]:
        return self._orbax(lambda c, path: c.metadata(path).item_metadata.tree)

    def _orbax(self, call):
        """Orbax and TensorStore raise all kinds of errors for a damaged folder; here it is one."""
        import orbax.checkpoint as ocp

        path = (self.path / ARRAYS).absolute()
        if not path.is_dir():
            raise CheckpointError(path, "no such folder: the arrays are missing")
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                return call(checkpointer, path)
        except Exception as error:
            first = str(error).strip().splitlines()[:1]
            reason = first[0][:200] if first else type(error).__name__
            raise CheckpointError(path, f"cannot be read as an Orbax folder: {reason}") from error


def _restored(kind: Any, value: Any) -> Any:
    """What `asdict` made of a value of this kind, as it was. Of a union the class is taken that has
    these fields; fields that are absent are younger than the folder."""
    if isinstance(value, list):
        (inner, *_) = get_args(kind) or (Any,)
        return [_restored(inner, one) for one in value]  # configs make tuples of lists
    if not isinstance(value, dict):
        return value
    kinds = [one for one in (get_args(kind) or (kind,)) if is_dataclass(one)]
    if len(kinds) > 1:
        kinds = [one for one in kinds if value.keys() == {part.name for part in fields(one)}]
    if not kinds:
        raise ValueError(f"no part of a config has the fields {', '.join(value)}")
    types = {part.name: part.type for part in fields(kinds[0])}
    return kinds[0](**{key: _restored(types.get(key), one) for key, one in value.items()})


def _info(entry: Any) -> TensorInfo:
    dtype, shape = np.dtype(entry.dtype), tuple(entry.shape)
    return TensorInfo(shape, dtype.name, dtype, int(np.prod(shape)) * dtype.itemsize)
