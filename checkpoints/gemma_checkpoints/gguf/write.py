"""Writes a model as a GGUF file that llama.cpp loads."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from gemma_jax.atomic_files import replacing
from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma
from gemma_jax.weights.protocol import StandIn
from gemma_jax.weights.tree import flat_params

from ..beside_config import refuse_beside_config
from ..catalog import Notify, resolve, to_stderr
from ..errors import CheckpointError
from ..export import host_array
from ..formats import open_source
from ..generation_config import generation_defaults
from ..hf.layer_heads import is_gemma4
from ..name_table import Row, expand
from ..params import Slot, depths, named_slots
from ..rearrange import shape as side_shape
from ..source import Source
from ..tokenizers import find_tokenizer, is_gguf
from .metadata_out import add_config, architecture, query_factor
from .mix import MIXES, tensor_types
from .names import EMBEDDING, PER_LAYER_TABLE, STACKS, gguf_table
from .vocabulary_out import add_generation, add_vocabulary, name_in_header

CHUNK = 1 << 22  # values that are rounded at a time
MAX_HALF = 65_504
UNUSED = {"attn_k": "k_proj", "attn_v": "v_proj", "attn_k_norm": "k_norm"}


def save_gguf(
    model: Gemma,
    path: str | Path,
    mix: str = "q8_0",
    *,
    source: str | Path,
    name: str | None = None,
    notify: Notify | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Saves the decoder of a model as a new GGUF file, which appears whole or not at all.

    Names, norms, metadata and vocabulary are those that llama.cpp's converter writes. Towers stay
    behind; `notify` is told. Of Gemma 3n, llama.cpp wants keys and values of the layers that share
    another's: they come from `source`, or are zeros.

    Args:
      model: In floats. What stands in the place of arrays is widened, one layer at a time.
      path: A file that does not exist.
      mix: `"q4_0"`, `"q8_0"` or `"q4_k_m"`; see `gguf.mix` for the type of each tensor.
      source: The checkpoint that the model came from (name or path), which has the vocabulary.
      name: Of the model, for people. Default: that of the source.
      notify: Told what is left behind. Default: to stderr.
      progress: Called with (bytes done, bytes in all).

    Raises:
      CheckpointError: the file exists or cannot be written, the source has no vocabulary, or the
        format cannot say what the model is.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> import tempfile
      >>> model = gc.load_weights("checkpoints/digits", modalities=("text",))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     saved = gc.save_gguf(model, f"{folder}/d.gguf", "q8_0", source="checkpoints/digits")
      ...     gc.describe(saved).format
      'GGUF'
    """
    target, origin = Path(path), resolve(source)
    _refuse_taken(target)
    refuse_beside_config(target, model)
    if model.cfg.bidirectional or model.cfg.text_embedding is not None:
        raise CheckpointError(
            target,
            "a model that makes embeddings is another architecture in llama.cpp, which is not "
            "written here; save_hf keeps it",
        )
    if is_gemma4(model.cfg):
        raise CheckpointError(
            target, "GGUF files of Gemma 4 are not written here; save_hf keeps the model"
        )
    if mix not in MIXES:
        raise ValueError(f"{mix=} must be one of: {', '.join(MIXES)}")
    vocabulary = find_tokenizer(origin)
    if vocabulary is None:
        raise CheckpointError(origin, "has no tokenizer, which a GGUF file needs")
    cfg = replace(model.cfg, vision=None, audio=None, modality_vocabularies=())
    if cfg != model.cfg:
        (notify or to_stderr)(
            f"{target.name}: the decoder alone; towers go into files of their own"
        )
    try:
        tensors = _tensors(model, cfg, open_source(origin))
        types = tensor_types({tensor.name: tensor.shape for tensor in tensors}, MIXES[mix])
        with replacing(target) as part:
            writer = _writer(part, cfg, MIXES[mix].file_type, name or _name(origin))
            add_vocabulary(writer, vocabulary, cfg.vocab_size, sampling=origin.is_file())
            if origin.is_dir():
                add_generation(writer, generation_defaults(origin))
            _write(writer, tensors, types, progress)
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(target, f"cannot be written: {error}") from None
    except OSError as error:
        raise CheckpointError(target, f"cannot be written: {error.strerror or error}") from error
    return target


@dataclass(frozen=True)
class GGUFOut:
    """One tensor of a new file.

    Attributes:
      shape: Rows first, as NumPy has it.
      parts: Make it, or the matrices of a stack, float32.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Callable[[], np.ndarray], ...]

    def chunks(self) -> Iterator[np.ndarray]:
        """All of it, some rows at a time."""
        _, rows, width = (1, 1, *self.shape)[-3:]
        step = max(1, CHUNK // width)
        for part in self.parts:
            array = part().reshape(rows, width)
            for i in range(0, rows, step):
                yield np.asarray(array[i : i + step], np.float32)


def _tensors(model: Gemma, cfg: GemmaConfig, source: Source) -> list[GGUFOut]:
    """In the order of the layers, what belongs to none first."""
    params, slots = flat_params(model), named_slots(model)
    single: dict[str, GGUFOut] = {}
    for ours, row in expand(gguf_table(cfg), depths(cfg)).items():
        factor = query_factor(cfg) if ours.endswith("q_norm.scale") else 1.0
        part = partial(_array, params[slots[ours].path], row, slots[ours], factor)
        single[row.theirs] = GGUFOut(row.theirs, _shape(row, slots[ours]), (part,))
    for name in STACKS:
        inner = [single.pop(one) for one in sorted(single) if one.startswith(f"{name}[")]
        if inner:
            parts = tuple(part for one in inner for part in one.parts)
            single[name] = GGUFOut(name, (len(inner), *inner[0].shape), parts)
    if (table := single.get(PER_LAYER_TABLE)) is not None:
        single[PER_LAYER_TABLE] = _with_rows(table, single[EMBEDDING].shape[0])
    for i, spec in enumerate(cfg.layers):
        if spec.kv == "shared":
            for theirs, short in UNUSED.items():
                name = f"blk.{i}.{theirs}.weight"
                like = single[f"blk.0.{theirs}.weight"]
                part = partial(_unused, source, name, f"layers.{i}.self_attn.{short}.weight", like)
                single[name] = GGUFOut(name, like.shape, (part,))
    return sorted(single.values(), key=lambda tensor: _layer(tensor.name))


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def _shape(row: Row, slot: Slot) -> tuple[int, ...]:
    return slot.shape if row.parsed is None else side_shape(row.parsed.left, slot.sizes)


def _array(param: nnx.Param, row: Row, slot: Slot, factor: float) -> np.ndarray:
    """One layer's parameter as the file has it, float32, times a factor."""
    value = param.get_value()
    if isinstance(value, StandIn):
        one = value if slot.row is None else jax.tree.map(lambda a: a[slot.row], value)
        array = np.asarray(one.dense(), np.float32)
    else:
        array = host_array(param, slot.row).astype(np.float32)
    if row.parsed is not None:
        array = row.parsed.inverse(array, slot.sizes)
    array = array + np.float32(1) if row.plus_one else array
    return array if factor == 1 else array * np.float32(factor)


def _with_rows(table: GGUFOut, count: int) -> GGUFOut:
    """The table with rows of zeros at its end, as many as the embedding has."""
    (part,), (rows, width) = table.parts, table.shape

    def filled() -> np.ndarray:
        return np.concatenate([part()[:count], np.zeros((max(0, count - rows), width), np.float32)])

    return GGUFOut(table.name, (count, width), (filled,))


def _unused(source: Source, theirs: str, hf: str, like: GGUFOut) -> np.ndarray:
    """A tensor that no model computes with, from the source, if it has one like it."""
    for name in (theirs, hf):
        info = source.tensors.get(name)
        if info is not None and info.shape == like.shape:
            return source.read(name).astype(np.float32)
    return np.zeros(like.shape, np.float32)


def _writer(path: Path, cfg: GemmaConfig, file_type: int, name: str) -> Any:
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            path, 'writing GGUF files needs the gguf package: pip install "gemma-jax[gguf]"'
        ) from None
    writer = gguf.GGUFWriter(path, architecture(cfg))
    writer.add_type("model")
    writer.add_name(name)
    add_config(writer, cfg, file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _write(
    writer: Any,
    tensors: list[GGUFOut],
    types: Mapping[str, str],
    progress: Callable[[int, int], None] | None,
) -> None:
    import gguf

    kinds = {name: gguf.GGMLQuantizationType[kind] for name, kind in types.items()}
    total, done = 0, 0
    for tensor in tensors:
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, kinds[tensor.name])
        nbytes = math.prod(shape)
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.uint8), nbytes, raw_dtype=kinds[tensor.name]
        )
        total += nbytes
    values = sum(math.prod(tensor.shape) for tensor in tensors)
    writer.add_size_label(gguf.size_label(values, 0, 0, 0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        encoded = [_encoded(chunk, tensor.name, kinds[tensor.name]) for chunk in tensor.chunks()]
        writer.write_tensor_data(np.concatenate(encoded))
        done += sum(one.nbytes for one in encoded)
        if progress is not None:
            progress(done, total)
    writer.close()


def _encoded(values: np.ndarray, name: str, kind: Any) -> np.ndarray:
    """Bytes of some rows."""
    import gguf

    if kind.name == "F16" and np.abs(values).max(initial=0) > MAX_HALF:
        raise ValueError(f"{name} holds values beyond those of float16")
    return gguf.quants.quantize(np.ascontiguousarray(values), kind).view(np.uint8)


def _name(origin: Path) -> str:
    if origin.is_file() and is_gguf(origin):
        return name_in_header(origin) or origin.stem
    return origin.resolve().name.replace("-", " ")


def _refuse_taken(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise CheckpointError(target, "exists already: choose another name, or remove it first")
    if not target.parent.is_dir():
        raise CheckpointError(target, "its parent folder does not exist: create it first")
