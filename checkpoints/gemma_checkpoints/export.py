"""Writes a model as a Hugging Face folder, losslessly."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.names import EMBEDDERS
from gemma_jax.distributed import fetched
from gemma_jax.weights.protocol import StandIn
from gemma_jax.weights.tree import ParamPath, flat_params, with_attributes

from .beside_config import refuse_beside_config
from .catalog import resolve
from .errors import CheckpointError
from .folders import new_folder
from .hf.compressed_out import PackedPart, Storage, compressed
from .hf.config import TOWERS, config_from_hf, text_config
from .hf.config_out import config_to_hf
from .hf.folder import CONFIG, INDEX, SINGLE, HFFolder
from .hf.names import DENSE, LINEAR, hf_table, published_name, short_name, unused
from .hf.processor_config import says_processor, without_processor
from .hf.processor_out import processor_to_hf
from .hf.quantised import split_quantisation
from .hf.sentence_folder_out import sentence_files
from .json_values import Json, flag, read_json
from .name_table import Row, dropped, expand
from .params import Slot, depths, named_slots
from .rearrange import shape as side_shape
from .safetensors_file import ENCODINGS, write_safetensors
from .tokenizers import copy_companions

MAX_SHARD = 5_000_000_000  # bytes

PLAIN = "load the model with plain weights, and slice it rather than view it"
WHAT_TO_DO = {
    "Adapted": "merge the adapters, or save them alone by save_adapter",
    "AdaptedRows": "load and merge one of the adapters alone",
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of the export, and the parameter that it comes from."""

    name: str
    row: Row
    slot: Slot
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        parsed = self.row.parsed
        return self.slot.shape if parsed is None else side_shape(parsed.left, self.slot.sizes)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, params: dict[ParamPath, nnx.Param]) -> np.ndarray:
        array = host_array(params[self.slot.path], self.slot.row)
        if self.row.parsed is not None:
            array = self.row.parsed.inverse(array, self.slot.sizes)
        return array.astype(self.dtype, copy=False)


@dataclass(frozen=True)
class UnusedTensor:
    """One tensor of the export that no model has: it goes from the source to the new folder."""

    name: str
    short_name: str
    source: HFFolder
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.tensors[self.short_name].shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, params: dict[ParamPath, nnx.Param]) -> np.ndarray:
        return self.source.read(self.short_name).astype(self.dtype, copy=False)


AnyTensor = Tensor | UnusedTensor | PackedPart


def save_hf(
    model: Gemma,
    folder: str | Path,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    weights: str | None = None,
    max_shard_bytes: int = MAX_SHARD,
    source: str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Saves `model` as a new Hugging Face folder, which appears whole or not at all.

    A model that was loaded with `dtype=None` comes out with the bytes that went in. One that sees
    becomes a `gemma3` or `gemma3n` folder; if only its decoder was loaded, a `gemma3_text` or
    `gemma3n_text` folder, and Gemma 4 a `gemma4_text` folder. transformers has Gemma 3n with both
    of its towers or with none.

    Args:
      model: Dense parameters in float32, float16 or bfloat16.
      folder: Must not exist, or be empty.
      dtype: To cast to; default: as the parameters are.
      weights: `"int4"`, `"int8"`, or one of them with a group of inputs (`"int4:128"`): matrices of
        attention and feed-forward layers are rounded, and stored as compressed-tensors does. int4
        has a scale per 32 inputs unless it says so, int8 one per output.
      max_shard_bytes: A larger model becomes several files with an index.
      source: The checkpoint that the model came from (name or path): its tokenizer goes along, so
        do settings of its processors of images and sounds that are those of the model, and
        if it is a Hugging Face folder of the same architecture, so do its `config.json`, its
        spelling of the tensors' names, and what Gemma 3n's last layers have but never use. Else
        names are spelled as in published files.
      progress: Called with (bytes done, bytes in all).

    Raises:
      CheckpointError: the folder is taken or cannot be written, or transformers has no class for
        this architecture.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> import tempfile
      >>> model = gc.load_weights("checkpoints/digits")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     saved = gc.save_hf(model, f"{folder}/copy", source="checkpoints/digits")
      ...     sorted(path.name for path in saved.iterdir())
      ['config.json', 'model.safetensors', 'tokenizer.model']
    """
    if model.cfg.modality_vocabularies and model.cfg.vision is None and model.cfg.audio is None:
        model = _decoder(model)
    target, params = Path(folder), flat_params(model)
    storage = None if weights is None else Storage.parse(weights)
    refuse_inexact(target, params)
    refuse_beside_config(target, model)
    if not all(param.get_value().is_fully_addressable for param in params.values()):
        raise CheckpointError(
            target,
            "a Hugging Face folder is written by one process, and this one has a part of the "
            "model: save it as Orbax, and convert that",
        )
    source = None if source is None else resolve(source)
    try:
        config, origin = _from_source(source, model.cfg)
        config = _new_config(model.cfg) if config is None else config
        processor = _processor(source, model.cfg)
        tensors: list[AnyTensor] = [
            *_tensors(model, params, dtype, {} if origin is None else origin.spellings),
            *([] if origin is None else _unused(origin, dtype)),
        ]
        tensors, dense = _split(tensors)
        files, places = _sentence_files(model.cfg, source)
        plain = tensors[0].dtype
        if storage is not None:
            named = [(one.row.ours if isinstance(one, Tensor) else None, one) for one in tensors]
            tensors = compressed(named, storage)
            config = config | {"quantization_config": storage.config(model.cfg)}
    except ValueError as error:
        raise CheckpointError(target, f"cannot be exported: {error}") from None
    total = sum(tensor.nbytes for tensor in [*tensors, *dense])
    with new_folder(target, needed=total) as part:
        _write_config(part / CONFIG, config, plain, source)
        _write_companions(part, source, processor)
        for name, content in files.items():
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_bytes(content)
        shards = _shards(tensors, max_shard_bytes) | _dense_files(places, dense)
        done = 0
        for file, shard in shards.items():
            for size in _write_shard(part / file, shard, params):
                done += size
                if progress is not None:
                    progress(done, total)
        _write_index(part, tensors, max_shard_bytes)
    return target


def tensors_by_name(model: Gemma, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
    """The parameters of a model, or of what is shaped like one, as tensors of Hugging Face.

    Args:
      names: Those that are wanted, in any of the spellings that transformers has had; default: all,
        as published files spell them.

    Raises:
      ValueError: A name that such a model does not have.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> model = gc.load_weights("checkpoints/digits", modalities=("text",))
      >>> arrays = gc.tensors_by_name(model, ["model.language_model.norm.weight"])
      >>> arrays["model.language_model.norm.weight"].shape
      (64,)
    """
    params = flat_params(model)
    tensors = {short_name(one.name): one for one in _tensors(model, params, None, {})}
    wanted = [one.name for one in tensors.values()] if names is None else list(names)
    if unknown := [name for name in wanted if short_name(name) not in tensors]:
        raise ValueError(f"this model has no parameter {', '.join(unknown[:4])}")
    return {name: tensors[short_name(name)].array(params) for name in wanted}


def tensor_names(model: Gemma) -> dict[ParamPath, list[str]]:
    """What the tensors of each parameter are called by Hugging Face, layer by layer.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> model = gc.load_weights("checkpoints/digits", modalities=("text",))
      >>> gc.tensor_names(model)["final_norm", "scale"]
      ['norm.weight']
    """
    slots, rows = named_slots(model), expand(hf_table(model.cfg), depths(model.cfg))
    names: dict[ParamPath, list[str]] = {}
    for ours, row in rows.items():
        names.setdefault(slots[ours].path, []).append(row.theirs)
    return names


def _decoder(model: Gemma) -> Gemma:
    """The model without embeddings that transformers has only together with towers."""
    cfg = replace(model.cfg, modality_vocabularies=())
    return with_attributes(model, cfg=cfg, modality_embedders=nnx.List([]))


def refuse_inexact(
    target: Path, params: dict[ParamPath, nnx.Param], but: type[StandIn] | None = None
) -> None:
    """Raises `CheckpointError` if a parameter is not a plain array of floats; a line per kind.

    Args:
      but: What may stand in the place of an array.
    """
    inexact: dict[str, list[str]] = {}
    for path, param in params.items():
        value = param.get_value()
        if but is not None and isinstance(value, but):
            continue
        stands_in = isinstance(value, StandIn)
        if stands_in or value.dtype not in ENCODINGS:
            kind = type(value).__name__ if stands_in else str(value.dtype)
            inexact.setdefault(kind, []).append(".".join(map(str, path)))
    problems = [
        f"{first}{f' (and {len(more)} more)' if more else ''} is {kind}: only plain floats can be "
        f"saved; {WHAT_TO_DO.get(kind, PLAIN)}"
        for kind, (first, *more) in inexact.items()
    ]
    if problems:
        raise CheckpointError(target, problems)


def tensor_bytes(params: dict[ParamPath, nnx.Param]) -> int:
    return sum(param.get_value().nbytes for param in params.values())


def host_array(param: nnx.Param, row: int | None) -> np.ndarray:
    """One layer's parameter as NumPy; a view where the array lies in host memory."""
    value = param.get_value()
    if row is None:
        return fetched(value)
    in_view = value.is_fully_addressable and all(d.platform == "cpu" for d in value.devices())
    return np.asarray(value)[row] if in_view else fetched(value[row])


def _tensors(
    model: Gemma, params: dict[ParamPath, nnx.Param], dtype, spellings: Mapping[str, str]
) -> list[Tensor]:
    """In the order of the layers, the decoder's first."""
    slots, rows = named_slots(model), expand(hf_table(model.cfg), depths(model.cfg))

    def tensor(ours: str) -> Tensor:
        row, slot = rows[ours], slots[ours]
        name = spellings.get(row.theirs) or published_name(row.theirs, model.cfg)
        stored = np.dtype(params[slot.path].get_value().dtype if dtype is None else dtype)
        return Tensor(name, row, slot, stored)

    return [tensor(ours) for ours in sorted(rows, key=_place)]


def _unused(folder: HFFolder, dtype: jax.typing.DTypeLike | None) -> list[UnusedTensor]:
    names = dropped(unused(folder.config), folder.tensors)
    return [
        UnusedTensor(folder.spellings[name], name, folder, np.dtype(dtype or info.dtype))
        for name, info in folder.tensors.items()
        if name in names
    ]


def _split(tensors: list[AnyTensor]) -> tuple[list[AnyTensor], list[Tensor]]:
    """What the decoder has, and dense layers behind it, which have files of their own."""
    dense = [t for t in tensors if isinstance(t, Tensor) and t.row.theirs.startswith(DENSE)]
    return [t for t in tensors if t not in dense], dense


def _dense_files(places: list[str], dense: list[Tensor]) -> dict[str, list[AnyTensor]]:
    return {f"{place}/{SINGLE}": [replace(one, name=LINEAR)] for place, one in zip(places, dense)}


def _sentence_files(cfg: GemmaConfig, source: Path | None) -> tuple[dict[str, bytes], list[str]]:
    return ({}, []) if cfg.text_embedding is None else sentence_files(cfg, source)


def _place(name: str) -> tuple[int, int]:
    """Part and layer of a parameter; what belongs to no layer comes first in its part."""
    parts = ("vision.", EMBEDDERS, "audio.")
    part = next((i for i, start in enumerate(parts, 1) if name.startswith(start)), 0)
    _, in_layer, rest = name.partition("blocks.")
    return part, int(rest.split(".")[0]) if in_layer else -1


def _shards(tensors: list[AnyTensor], limit: int) -> dict[str, list[AnyTensor]]:
    """File name -> tensors, each file filled up to `limit`."""
    shards: list[list[AnyTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > limit:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": s for i, s in enumerate(shards, 1)}


def _write_shard(
    path: Path, shard: list[AnyTensor], params: dict[ParamPath, nnx.Param]
) -> Iterator[int]:
    """Yields the bytes of each tensor that was written, in the safetensors package's order."""
    ordered = sorted(shard, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
    header = {tensor.name: (tensor.shape, tensor.dtype) for tensor in ordered}
    arrays = (tensor.array(params) for tensor in ordered)
    for array in write_safetensors(path, header, arrays):
        yield array.nbytes


def _write_index(folder: Path, tensors: list[AnyTensor], limit: int) -> None:
    shards = _shards(tensors, limit)
    if len(shards) == 1:
        return
    where = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    size = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _from_source(source: Path | None, cfg: GemmaConfig) -> tuple[Json | None, HFFolder | None]:
    """The config of `source`, if it describes `cfg`, and `source` itself if it has weights too."""
    if source is None or not (source / CONFIG).is_file():
        return None, None
    raw, _ = split_quantisation(read_json(source / CONFIG))
    text = text_config(raw)
    cfg = without_processor(cfg)
    alone = cfg.vision is None and cfg.audio is None
    if _describes(raw, cfg) and (not alone or text == raw):
        has_weights = (source / SINGLE).exists() or (source / INDEX).exists()
        return _with_head(raw, cfg), HFFolder(source) if has_weights else None
    return _with_head(text, cfg) if _describes(text, cfg) else None, None


def _new_config(cfg: GemmaConfig) -> Json:
    try:
        return config_to_hf(cfg)
    except ValueError as error:
        raise ValueError(f"{error}; save_orbax keeps it") from None


def _describes(raw: Json, cfg: GemmaConfig) -> bool:
    """Whether a config is that of the model, but for its head: what is stored decides on that."""
    has = {"image": cfg.vision is not None, "audio": cfg.audio is not None}
    declared = config_from_hf(raw, modalities=[one for one in TOWERS if has[one]])
    return replace(declared, tied_head=cfg.tied_head) == replace(cfg, text_embedding=None)


def _write_companions(
    folder: Path, source: Path | None, processor: Mapping[str, Json] | None
) -> None:
    """The tokenizer of the source, and what `_processor` said."""
    if source is not None:
        copy_companions(source, folder, processors=processor is None)
    for name, content in (processor or {}).items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _processor(source: Path | None, cfg: GemmaConfig) -> Mapping[str, Json] | None:
    """File name -> how the towers' inputs are prepared, if it is not as by default; `None` if the
    files of the source say what the model does."""
    alone = cfg.vision is None and cfg.audio is None
    if alone:
        return {}
    return None if source is not None and says_processor(source, cfg) else processor_to_hf(cfg)


def _with_head(config: Json, cfg: GemmaConfig) -> Json:
    """`config` with the truth about the head: transformers before 5 asks the inner config too."""
    if flag(config, "tie_word_embeddings", default=True) == cfg.tied_head:
        return config
    inner = config.get("text_config")
    tied = {"tie_word_embeddings": cfg.tied_head}
    return config | tied | ({} if inner is None else {"text_config": inner | tied})


def _write_config(path: Path, config: Json, dtype: np.dtype, source: Path | None) -> None:
    """The source's own file, byte for byte, if it says all that `config` says."""
    config = _with_dtype(config, dtype.name)
    own = None if source is None else source / CONFIG
    if own is not None and own.is_file() and read_json(own) == config:
        path.write_bytes(own.read_bytes())
    else:
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _with_dtype(config: Json, name: str, default: tuple[str, ...] = ("torch_dtype",)) -> Json:
    """`config` with the dtype of the weights, under the keys that it has for it at any depth."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or default
    inner = {k: _with_dtype(v, name, ()) for k, v in config.items() if isinstance(v, dict)}
    return config | inner | dict.fromkeys(keys, name)
