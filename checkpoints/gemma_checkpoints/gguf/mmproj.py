"""The `mmproj` file of a Gemma 3: its SigLIP tower and projector, which llama.cpp keeps apart.

The model's own file has the decoder and the vocabulary; this one has no vocabulary, so the ids that
mark images are looked up in that of the model. Every key of the header is read, passed over for a
reason, or refused by its name.

Sources: `tools/mtmd/clip.cpp`, `tools/mtmd/clip-impl.h` and `Gemma3VisionModel` in
`conversion/gemma.py` of llama.cpp (November 2026; also as vendored by llama-cpp-python 0.3.16).
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from gemma_jax.config import GemmaConfig
from gemma_jax.encoder_config import ImageProcessing, VisionConfig
from gemma_jax.text.gguf_header import read_header

from ..json_values import MAX_LAYERS
from ..name_table import Row, Table
from ..source import TensorInfo
from .config import Reader
from .config_keys import UNREAD

_VISION = "clip.vision."
KEYS: Mapping[str, str] = {
    "d_tower": "embedding_length",
    "d_ff": "feed_forward_length",
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "image_size": "image_size",
    "patch_size": "patch_size",
}
WIDTH, SCALE, EPS = "projection_dim", "projector.scale_factor", "attention.layer_norm_epsilon"
READ = frozenset([*KEYS.values(), WIDTH, SCALE, EPS, "image_mean", "image_std"])
DEFAULT_SCALE = 4  # patches per soft token along a side, in files that do not say it
# What every such file is; files of before June 2025 have no `general.type`.
FIXED: Mapping[str, object] = {
    "general.architecture": "clip",
    "clip.has_vision_encoder": True,
    "clip.use_gelu": True,  # by its tanh approximation; without, it is a sigmoid's
}
TYPES = ("clip.projector_type", _VISION + "projector_type")  # the second in files of two towers
# Switches of other towers.
UNSET: Mapping[str, object] = {
    "general.type": "mmproj",
    "clip.use_silu": False,
    "clip.has_audio_encoder": False,
    "clip.has_text_encoder": False,
    "clip.has_llava_projector": False,
}
PIECES: Mapping[str, str] = {
    "image_token": "<image_soft_token>",
    "start_token": "<start_of_image>",
    "end_token": "<end_of_image>",
}
IMAGE_TOKEN = 262_144  # of vocabularies that were cut off before it

_BLOCK, _THEIRS = "vision.tower.blocks.{i}.", "v.blk.{i}."
PROJECTOR_AND_ENDS: Table = (
    Row("vision.tower.patches.proj.w", "v.patch_embd.weight"),
    Row("vision.tower.patches.proj.bias", "v.patch_embd.bias"),
    Row("vision.tower.patches.positions", "v.position_embd.weight"),
    Row("vision.tower.final_norm.scale", "v.post_ln.weight"),
    Row("vision.tower.final_norm.bias", "v.post_ln.bias"),
    # Of the norms, the projector's alone is one of Gemma's.
    Row("vision.projector.norm.scale", "mm.soft_emb_norm.weight", plus_one=True),
    Row("vision.projector.proj.w", "mm.input_projection.weight", "C D -> D C"),
)
BLOCKS: Table = (
    Row(_BLOCK + "pre_attn_norm.scale", _THEIRS + "ln1.weight"),
    Row(_BLOCK + "pre_attn_norm.bias", _THEIRS + "ln1.bias"),
    Row(_BLOCK + "attn.q.w", _THEIRS + "attn_q.weight", "(N H) C -> N H C"),
    Row(_BLOCK + "attn.q.bias", _THEIRS + "attn_q.bias", "(N H) -> N H"),
    Row(_BLOCK + "attn.k.w", _THEIRS + "attn_k.weight", "(N H) C -> N H C"),
    Row(_BLOCK + "attn.k.bias", _THEIRS + "attn_k.bias", "(N H) -> N H"),
    Row(_BLOCK + "attn.v.w", _THEIRS + "attn_v.weight", "(N H) C -> N H C"),
    Row(_BLOCK + "attn.v.bias", _THEIRS + "attn_v.bias", "(N H) -> N H"),
    Row(_BLOCK + "attn.o.w", _THEIRS + "attn_out.weight", "C (N H) -> C N H"),
    Row(_BLOCK + "attn.o.bias", _THEIRS + "attn_out.bias"),
    Row(_BLOCK + "pre_ffn_norm.scale", _THEIRS + "ln2.weight"),
    Row(_BLOCK + "pre_ffn_norm.bias", _THEIRS + "ln2.bias"),
)
UP, DOWN = "ffn_up", "ffn_down"


def mmproj_table(vision: VisionConfig, tensors: Mapping[str, TensorInfo]) -> Table:
    """The rows of a tower. The first converters called the two matrices of a feed-forward network
    by each other's name; their shapes tell (`clip.cpp` does the same)."""
    down = tensors.get("v.blk.0.ffn_down.weight")
    swapped = down is not None and down.shape[-1] == vision.d_tower != vision.d_ff
    up, down = (DOWN, UP) if swapped else (UP, DOWN)
    return (
        PROJECTOR_AND_ENDS
        + BLOCKS
        + tuple(
            Row(f"{_BLOCK}ffn.{ours}.{part}", f"{_THEIRS}{theirs}.{name}")
            for ours, theirs in (("up", up), ("down", down))
            for part, name in (("w", "weight"), ("bias", "bias"))
        )
    )


def vision_from_mmproj(
    metadata: Mapping[str, object], model: Path, cfg: GemmaConfig
) -> VisionConfig:
    """The tower of a header, for the decoder `cfg` in the file `model`.

    Raises:
      ValueError: another kind of tower, or one for another decoder; or a key that is unknown.
    """
    _refuse_others(metadata)
    read = Reader(metadata, _VISION)
    sizes = {field: read.whole(key) for field, key in KEYS.items()}
    if sizes["num_layers"] > MAX_LAYERS:
        raise ValueError(f"{_VISION}block_count {sizes['num_layers']} is beyond {MAX_LAYERS}")
    if (width := read.whole(WIDTH)) != cfg.d_model:
        raise ValueError(
            f"{_VISION}{WIDTH} is {width}, but {model.name} has d_model={cfg.d_model}: this tower "
            "belongs to another model"
        )
    side, scale = sizes["image_size"] // sizes["patch_size"], read.whole(SCALE, DEFAULT_SCALE)
    if side % scale:
        raise ValueError(f"{_VISION}{SCALE} {scale} does not divide the {side} patches of a side")
    return VisionConfig(
        **sizes,
        **_marker_ids(model),
        num_soft_tokens=(side // scale) ** 2,
        norm_eps=round(read.number(EPS), 12),  # stored as float32
        images=ImageProcessing(
            mean=_channels(read, "image_mean"), std=_channels(read, "image_std")
        ),
    )


def has_fate(key: str) -> bool:
    """Whether a key of such a header is read, unread for a reason, or a switch."""
    if key.startswith(_VISION) and key.removeprefix(_VISION) in READ:
        return True
    known = key in FIXED or key in TYPES or key in UNSET
    return known or any(fnmatchcase(key, pattern) for pattern in UNREAD)


def _refuse_others(metadata: Mapping[str, object]) -> None:
    problems = [
        f"{key} is {metadata.get(key)!r}; expected {expected!r}"
        for key, expected in FIXED.items()
        if metadata.get(key) != expected
    ]
    kinds = [metadata[key] for key in TYPES if key in metadata]
    if kinds != ["gemma3"]:
        problems.append(f"{TYPES[0]} is {kinds or None!r:.80}; expected 'gemma3'")
    problems += [
        f"{key} is {metadata[key]!r}; only {unset!r} is supported"
        for key, unset in UNSET.items()
        if metadata.get(key, unset) != unset
    ]
    if unknown := [key for key in metadata if not has_fate(key)]:
        problems.append(f"{', '.join(unknown)}: unknown here, and may change what the tower sees")
    if problems:
        raise ValueError("; ".join(problems))


def _marker_ids(model: Path) -> dict[str, int]:
    """Ids of the pieces that stand around and for an image."""
    pieces = read_header(model).get("tokenizer.ggml.tokens")
    pieces = pieces if isinstance(pieces, list) else []
    found = {
        field: pieces.index(piece.encode())
        for field, piece in PIECES.items()
        if piece.encode() in pieces
    }
    if missing := [PIECES[name] for name in ("start_token", "end_token") if name not in found]:
        raise ValueError(
            f"the vocabulary of {model.name} has no {' and no '.join(missing)}: its model reads "
            "text alone"
        )
    return {"image_token": IMAGE_TOKEN} | found


def _channels(read: Reader, key: str) -> tuple[float, float, float]:
    value = read.get(key)
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"{_VISION}{key} must be three numbers, got {value!r:.80}")
    red, green, blue = (round(float(one), 6) for one in value)
    return red, green, blue
