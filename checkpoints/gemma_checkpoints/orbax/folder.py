"""Folders of ours: `gemma_jax.json` with the config, and one Orbax array per layer and parameter.

Names do not depend on how layers are stacked, so a folder loads into either layout.
"""

import json
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma
from gemma_jax.weights.tree import flat_params

from ..beside_config import noted_beside_config
from ..blocks import Blocks
from ..catalog import resolve
from ..errors import CheckpointError
from ..export import host_array, refuse_inexact, tensor_bytes
from ..folders import new_folder
from ..hf.names import hf_table
from ..json_values import read_json
from ..name_table import Row, Table, expand
from ..params import depths, named_slots
from ..source import TensorInfo
from ..tokenizers import copy_companions

MANIFEST, ARRAYS, VERSION = "gemma_jax.json", "arrays", 1


def save_orbax(model: Gemma, folder: str | Path, *, source: str | Path | None = None) -> Path:
    """Saves `model` as a new Orbax folder, which appears whole or not at all.

    A model of `Gemma(cfg, block=...)` is loaded by `gemma_jax.load(folder, block=...)` again: what
    the modules of its blocks are called is noted, with their attributes that are numbers, text or
    functions, and another `block`, or none, is refused. Of classes and functions names are
    compared, not the code behind them: the same name in another notebook is taken for the same.

    A model on the devices of several processes is written by all of them, each its own shards; they
    must call this together, on one file system, and have room for a second copy of their shards.

    Args:
      model: Dense parameters in float32, float16 or bfloat16; they are stored as they are.
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
    refuse_inexact(target, params)
    noted = noted_beside_config(target, model)
    source = None if source is None else resolve(source)
    slots = named_slots(model)
    arrays = {name: _array(params[slot.path], slot.row) for name, slot in slots.items()}
    with new_folder(target, needed=tensor_bytes(params)) as part:
        if jax.process_index() == 0:
            manifest = {"version": VERSION, "config": asdict(model.cfg)}
            manifest |= {"beside_config": noted} if noted else {}
            (part / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            if source is not None:
                copy_companions(source, part, processors=_has_towers(model.cfg))
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save((part / ARRAYS).absolute(), arrays)
    return target


def _has_towers(cfg: GemmaConfig) -> bool:
    return cfg.vision is not None or cfg.audio is not None


def _array(param: nnx.Param, row: int | None) -> np.ndarray | jax.Array:
    """One layer's parameter, on the host if this process has all of it."""
    value = param.get_value()
    if value.is_fully_addressable:
        return host_array(param, row)
    return value if row is None else value[row]


@dataclass
class OrbaxFolder:
    """See `Source`. Arrays are read whole: `rows` selects afterwards."""

    path: Path
    config: GemmaConfig = field(init=False)
    table: Table = field(init=False)
    tensors: dict[str, TensorInfo] = field(init=False)
    spoilt: dict[str, str] = field(init=False, default_factory=dict)
    beside_config: tuple[str, ...] = field(init=False)
    format = "Orbax"
    reads_rows = False
    notes = ()

    def __post_init__(self):
        manifest = read_json(self.path / MANIFEST)
        if manifest.get("version") != VERSION:
            found = manifest.get("version")
            raise CheckpointError(self.path / MANIFEST, f"version {found!r}; expected {VERSION}")
        try:
            self.config = _restored(GemmaConfig, manifest["config"])
            self.beside_config = tuple(manifest.get("beside_config", ()))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(self.path / MANIFEST, f"broken config: {error}") from None
        self.tensors = {name: _info(entry) for name, entry in self._metadata().items()}
        self.table = tuple(Row(r.ours, r.ours) for r in hf_table(self.config) if r.ours is not None)
        if self.beside_config:  # blocks of a user's own may have parameters of their own
            known = expand(self.table, depths(self.config))
            self.table += tuple(Row(name, name) for name in self.tensors if name not in known)

    def read(
        self, name: str, rows: slice = slice(None), columns: slice = slice(None)
    ) -> np.ndarray:
        import orbax.checkpoint as ocp

        wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
        request = ocp.args.PyTreeRestore(item={name: 0}, restore_args=wanted, partial_restore=True)
        array = self._orbax(lambda c, path: c.restore(path, args=request))[name]
        return array[rows] if array.ndim < 2 else array[rows, columns]

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
