"""Matrices of 4 or 8 bits as `compressed-tensors` stores them (llm-compressor, vLLM).

Of a linear layer there are:

    pack-quantized   weight_packed (int32, low bits first, 8 or 128 more than the code),
                     weight_shape
    int-quantized    weight (int8)
    both             weight_scale `[out, groups]`, and weight_zero_point if it is not symmetric
                     (packed along the first axis in pack-quantized)

    value = scale * (code - zero point)

Source: `quantization/quant_config.py`, `quant_args.py`, `compressors/pack_quantized` and
`compressors/naive_quantized` of compressed-tensors 0.20.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..blocks import FLOAT32, BlockForm, Blocks, halves
from ..json_values import Json
from ..source import TensorInfo

Read = Callable[..., np.ndarray]
PACKED, SCALE, ZERO = "weight_packed", "weight_scale", "weight_zero_point"
FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
BITS = (4, 8)
# Fields that change nothing of what the weights are, and why.
UNREAD = {
    "quant_method": "read elsewhere",
    "version": "of the program",
    "global_compression_ratio": "a measured result",
}
# Fields that may only say what is so without them.
UNSET: Mapping[str, tuple[object, ...]] = {
    "kv_cache_scheme": (None,),
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
    "moe_sparsity_config": (None,),
    "quantization_status": ("compressed",),
}
READ = ("config_groups", "format", "ignore")
OF_GROUP = ("targets", "weights", "input_activations", "output_activations", "format")
OF_WEIGHTS = ("num_bits", "type", "symmetric", "strategy", "group_size", "actorder", "dynamic")
OF_WEIGHTS_UNREAD = {
    "observer": "how scales were found",
    "observer_kwargs": "how scales were found",
    "scale_dtype": "the tensors say theirs",
    "zp_dtype": "the tensors say theirs",
}


@dataclass(frozen=True)
class Scheme:
    """How the layers of one group are stored.

    Attributes:
      group: Neighbouring inputs that share a scale; `None`: all of a row.
      targets: Names, `re:` and an expression, or classes of layers.
    """

    bits: int
    symmetric: bool
    group: int | None
    packed: bool
    targets: tuple[str, ...]


@dataclass(frozen=True)
class CompressedMatrix:
    """See `QuantisedMatrix`."""

    name: str  # of the layer, without `weight`
    scheme: Scheme
    info: TensorInfo
    parts: tuple[str, ...]
    read: Read
    group: int

    def blocks(self, rows: slice) -> Blocks:
        codes, scale, offset = self._arrays(rows)
        form = self.info.form
        assert form is not None
        if form.bits == 4:
            laid_out = halves(codes)
        else:
            laid_out = codes.view(np.int8).reshape(len(codes), -1, 32)
        return Blocks(form, laid_out, scale, offset)

    def values(self, rows: slice) -> np.ndarray:
        codes, scale, offset = self._arrays(rows)
        signed = codes.view(np.int8) if self.scheme.bits == 8 else codes.astype(np.int8) - 8
        grouped = signed.reshape(*scale.shape, -1) * scale.astype(np.float32)[..., None]
        if offset is not None:
            grouped += offset[..., None]
        return grouped.reshape(codes.shape)

    def _arrays(self, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Codes (uint8 from 0 to 15, or int8), scales and offsets, `[rows, ...]`."""
        bits, packed = self.scheme.bits, self.scheme.packed
        first, last, _ = rows.indices(self.info.shape[0])
        raw = self.read(self.parts[0], rows)
        if packed:
            codes = unpack(raw, bits)[:, : self.info.shape[1]]
            codes = codes if bits == 4 else codes ^ 0x80  # 128 less, as int8
        else:
            codes = raw if bits == 8 else (raw + 8).view(np.uint8)
        scale = self.read(f"{self.name}.{SCALE}", rows)
        scale = np.broadcast_to(scale.reshape(len(scale), -1), (last - first, self._groups))
        if self.scheme.symmetric:
            return np.ascontiguousarray(codes), scale, None
        zero = self._zero_points(first, last)
        scale = scale.astype(np.float32)
        return np.ascontiguousarray(codes), scale, -(scale * zero)

    def _zero_points(self, first: int, last: int) -> np.ndarray:
        """As signed codes, float32 `[rows, groups]`."""
        bits, name = self.scheme.bits, f"{self.name}.{ZERO}"
        if not self.scheme.packed:
            zero = self.read(name, slice(first, last))
            return zero.reshape(last - first, -1).astype(np.float32)
        each = 32 // bits
        raw = self.read(name, slice(first // each, -(-last // each)))
        rows = unpack(np.ascontiguousarray(raw.T), bits).T[first % each :][: last - first]
        return rows.astype(np.float32) - (1 << (bits - 1))

    @property
    def _groups(self) -> int:
        return self.info.shape[1] // self.group


def matrices(
    said: Json, tensors: Mapping[str, TensorInfo], spellings: Mapping[str, str], read: Read
) -> tuple[dict[str, CompressedMatrix], list[str]]:
    """See `quantised_matrices`."""
    schemes, problems, notes = _schemes(said)
    if problems:
        raise ValueError(*problems)
    found = {}
    ignored = said.get("ignore") or []
    for name in [name.removesuffix(f".{SCALE}") for name in tensors if name.endswith(f".{SCALE}")]:
        spelled = spellings[f"{name}.{SCALE}"].removesuffix(f".{SCALE}")
        try:
            if any(matches(spelled, one) for one in ignored):
                raise ValueError("is quantised, and in quantization_config.ignore")
            found[f"{name}.weight"] = _matrix(name, _scheme_of(spelled, schemes), tensors, read)
        except ValueError as error:
            problems.append(f"{spelled}: {error}")
    problems += _surplus(tensors, found)
    if not found and not problems:
        problems.append(f"quantization_config is set, but no tensor is called *.{SCALE}")
    if problems:
        raise ValueError(*problems)
    return found, notes


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes of 4 or 8 bits out of int32 words along the last axis, uint8, low bits first."""
    bytes_ = np.ascontiguousarray(words).view(np.uint8)  # little-endian
    if bits == 8:
        return bytes_
    out = np.empty((*bytes_.shape, 2), np.uint8)
    np.bitwise_and(bytes_, 15, out=out[..., 0])
    np.right_shift(bytes_, 4, out=out[..., 1])
    return out.reshape(*bytes_.shape[:-1], -1)


def matches(name: str, target: str) -> bool:
    """Whether a target names a layer: by itself, by `re:` and an expression from its beginning."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _scheme_of(name: str, schemes: list[Scheme]) -> Scheme:
    """Names go before expressions, and these before classes (`match_targets`)."""
    by_kind = (
        lambda target: target == name,
        lambda target: target.startswith("re:") and matches(name, target),
        lambda target: target == ("Embedding" if "embed_tokens" in name else "Linear"),
    )
    for fits in by_kind:
        for scheme in schemes:
            if any(fits(target) for target in scheme.targets):
                return scheme
    raise ValueError("is quantised, but no target of quantization_config.config_groups names it")


def _matrix(
    name: str, scheme: Scheme, tensors: Mapping[str, TensorInfo], read: Read
) -> CompressedMatrix:
    def need(part: str, encodings: tuple[str, ...]) -> TensorInfo:
        info = tensors.get(f"{name}.{part}")
        if info is None:
            raise ValueError(f"{part} is missing")
        if info.encoding not in encodings:
            raise ValueError(f"{part} is stored as {info.encoding}; expected {encodings[0]}")
        return info

    main = PACKED if scheme.packed else "weight"
    codes = need(main, ("I32",) if scheme.packed else ("I8",))
    parts = [f"{name}.{main}", f"{name}.{SCALE}"]
    shape = codes.shape
    if len(shape) != 2:
        raise ValueError(f"{main} has shape {list(shape)}; expected a matrix")
    if scheme.packed:
        need("weight_shape", ("I64", "I32"))
        parts.append(f"{name}.weight_shape")
        shape = tuple(read(f"{name}.weight_shape").ravel().tolist())
        if len(shape) != 2 or not 0 < min(shape) <= max(shape) < 1 << 40:
            raise ValueError(f"weight_shape is {list(shape)}; expected that of a matrix")
        words = -(-shape[-1] * scheme.bits // 32)
        if codes.shape != (shape[0], words):
            raise ValueError(
                f"{main} has shape {list(codes.shape)}; weight_shape {list(shape)} makes it "
                f"{[shape[0], words]}"
            )
    group = scheme.group or shape[1]
    if shape[1] % group:
        raise ValueError(f"groups of {group} do not divide rows of {shape[1]}")
    groups = shape[1] // group
    scale = need(SCALE, ("BF16", "F16", "F32"))
    if scale.shape not in ((shape[0], groups), (shape[0],) * (groups == 1)):
        raise ValueError(
            f"{SCALE} has shape {list(scale.shape)}; expected {[shape[0], groups]}: a group of "
            f"{group} of {list(shape)}"
        )
    if not scheme.symmetric:
        zero = need(ZERO, ("I32", "I8") if scheme.packed else ("I8",))
        parts.append(f"{name}.{ZERO}")
        rows = -(-shape[0] * scheme.bits // 32) if scheme.packed else shape[0]
        if zero.shape != (rows, groups):
            raise ValueError(f"{ZERO} has shape {list(zero.shape)}; expected {[rows, groups]}")
    dtype = scale.dtype if scheme.symmetric else FLOAT32
    form = BlockForm(scheme.bits, True, group, dtype, not scheme.symmetric)
    encoding = f"int{scheme.bits} in groups of {group}"
    nbytes = sum(tensors[part].nbytes for part in parts)
    whole = shape[1] % 32 == 0 and group % 32 == 0
    info = TensorInfo(shape, encoding, FLOAT32, nbytes, form if whole else None)
    return CompressedMatrix(name, scheme, info, tuple(parts), read, group)


def _surplus(tensors: Mapping[str, TensorInfo], found: Mapping[str, CompressedMatrix]) -> list[str]:
    """Lines for tensors of quantised layers that have no place in them."""
    used = {part for matrix in found.values() for part in matrix.parts}
    endings = (PACKED, ZERO, "weight_shape", "weight_g_idx", "weight_global_scale", "input_scale")
    endings += ("input_zero_point", "input_global_scale", "output_scale", "output_zero_point")
    return [
        f"{name} belongs to no layer that is quantised as quantization_config says"
        for name in tensors
        if name not in used and name.rpartition(".")[2] in endings
    ]


def _schemes(said: Json) -> tuple[list[Scheme], list[str], list[str]]:
    """The groups; what is wrong with `quantization_config`; what is done otherwise here."""
    where, notes = "quantization_config", []
    problems = [f"{where}.{key} is unknown here" for key in said if not _known(key)]
    problems += [
        f"{where}.{key} is {said[key]!r:.60}, which is not supported"
        for key, unset in UNSET.items()
        if key in said and said[key] not in unset
    ]
    ignored = said.get("ignore") or []
    if not isinstance(ignored, list) or not all(isinstance(one, str) for one in ignored):
        problems.append(f"{where}.ignore must be a list of names")
    groups, schemes = said.get("config_groups"), []
    if not isinstance(groups, dict) or not groups:
        return [], [*problems, f"{where}.config_groups is missing"], []
    for key, group in groups.items():
        at = f"{where}.config_groups.{key}"
        try:
            scheme, note = _scheme(group, said.get("format"))
            schemes.append(scheme)
            notes += [note] if note and note not in notes else []
        except ValueError as error:
            problems.append(f"{at}.{error}")
    return schemes, problems, notes


def _known(key: str) -> bool:
    return key in UNREAD or key in UNSET or key in READ


def _scheme(group: object, outer_format: object) -> tuple[Scheme, str | None]:
    if not isinstance(group, dict):
        raise ValueError("targets are missing")
    if unknown := [key for key in group if key not in OF_GROUP]:
        raise ValueError(f"{unknown[0]} is unknown here")
    stored = group.get("format") or outer_format
    weights, targets = group.get("weights"), group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(one, str) for one in targets):
        raise ValueError("targets must be a list of names")
    if not isinstance(weights, dict):
        raise ValueError("weights are missing")
    if weights.get("type", "int") != "int" or stored not in FORMATS:
        raise ValueError(
            f"format is {stored!r} of type {weights.get('type', 'int')!r}; only whole numbers in "
            f"{' and '.join(FORMATS[:2])} are read (no FP8, no FP4)"
        )
    for key in weights:
        if key not in OF_WEIGHTS and key not in OF_WEIGHTS_UNREAD and weights[key] is not None:
            raise ValueError(f"weights.{key} is {weights[key]!r:.60}, which is not supported")
    if group.get("output_activations") is not None:
        raise ValueError("output_activations are set, which is not supported")
    bits, strategy = weights.get("num_bits", 8), weights.get("strategy")
    size = weights.get("group_size")
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"weights.num_bits is {bits!r}; expected 4 or 8")
    if weights.get("dynamic", False) is not False:
        raise ValueError("weights.dynamic is set, which is not supported")
    if weights.get("actorder") not in (None, False, "static", "weight"):
        raise ValueError(
            f"weights.actorder is {weights['actorder']!r}: columns out of order (g_idx) are not "
            "supported"
        )
    if not isinstance(symmetric := weights.get("symmetric", True), bool):
        raise ValueError(f"weights.symmetric is {symmetric!r}; expected true or false")
    strategy = strategy or ("group" if isinstance(size, int) and size > 0 else "channel")
    if strategy not in ("group", "channel"):
        raise ValueError(f"weights.strategy is {strategy!r}; expected 'group' or 'channel'")
    if strategy == "group" and not (isinstance(size, int) and size > 0):
        raise ValueError(f"weights.group_size is {size!r}; expected a positive number")
    scheme = Scheme(
        bits=bits,
        symmetric=symmetric,
        group=size if strategy == "group" else None,
        packed=stored == "pack-quantized",
        targets=tuple(targets),
    )
    return scheme, _activations(group.get("input_activations"))


def _activations(said: object) -> str | None:
    """What is done otherwise: activations stay in floats here."""
    if said is None:
        return None
    if not isinstance(said, dict) or said.get("type", "int") != "int":
        raise ValueError("input_activations of this type are not supported")
    if said.get("dynamic") is not True:
        raise ValueError("input_activations have stored scales, which is not supported")
    return (
        f"made for activations that are rounded to int{said.get('num_bits', 8)} as they come; here "
        "weights alone are quantised"
    )
