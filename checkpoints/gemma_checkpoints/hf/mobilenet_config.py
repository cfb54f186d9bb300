"""The part of a Gemma 3n's `config.json` that is about images <-> `MobileNetConfig`.

transformers builds the tower with timm, which knows the published one by its name. Any other is
told block by block in `model_args.arch_def`, in timm's notation, and needs a timm that was taught
its name. The side of images is not in this file: `processor_config.py` reads it.
Source: `Gemma3nVisionConfig` of transformers 5.24; `models/mobilenetv5.py` of timm 1.0.31.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

from gemma_jax.config import ModalityVocabulary
from gemma_jax.encoder_config import MobileNetConfig
from gemma_jax.mobilenet_presets import MOBILENET_V5_300M

from ..json_values import Json, inside, positive, whole
from .arch_def import blocks_from_timm, blocks_to_timm

PUBLISHED, OTHER = "mobilenetv5_300m_enc", "mobilenetv5_enc"
PART = "vision_config"
_ARGS = PART + ".model_args."
DEFAULTS: Json = {
    "model_type": "gemma3n_vision",
    "architecture": PUBLISHED,
    "hidden_size": 2_048,
    "vocab_size": 128,
    "vocab_offset": 262_144,
    "rms_norm_eps": 1e-6,
}
TOKENS: Mapping[str, str] = {
    "image_token": "image_token_id",
    "start_token": "boi_token_id",
    "end_token": "eoi_token_id",
}
NUM_SOFT_TOKENS = "vision_soft_tokens_per_image"
OUTER_DEFAULTS: Json = {
    "image_token_id": 262_145,
    "boi_token_id": 255_999,
    "eoi_token_id": 262_144,
    NUM_SOFT_TOKENS: 256,
}
# Arguments of timm, and what it takes without them.
ARGS: Json = {
    "arch_def": None,
    "stem_size": 64,
    "num_features": None,
    "msfa_output_resolution": 16,
}


def mobilenet_from_hf(raw: Json) -> tuple[MobileNetConfig, ModalityVocabulary]:
    """The tower that a `config.json` declares, and the ids that are embedded in its width.

    Raises:
      ValueError: another kind of tower, or a value that is impossible.
    """
    inner, outer = inside(raw, PART, DEFAULTS), OUTER_DEFAULTS | raw
    if (kind := inner[f"{PART}.model_type"]) != DEFAULTS["model_type"]:
        raise ValueError(f"{PART}.model_type is {kind!r}; expected {DEFAULTS['model_type']!r}")
    args = inside(inner, f"{PART}.model_args", ARGS)
    if unknown := [key for key in args if key.removeprefix(_ARGS) not in ARGS]:
        raise ValueError(f"{', '.join(unknown)}: unknown here, and may change what the tower sees")
    width, side = whole(inner, f"{PART}.hidden_size"), whole(args, _ARGS + "msfa_output_resolution")
    if (features := args[_ARGS + "num_features"]) not in (None, width):
        raise ValueError(f"{_ARGS}num_features {features!r} is not hidden_size {width}")
    if (tokens := whole(outer, NUM_SOFT_TOKENS)) != side**2:
        raise ValueError(
            f"{NUM_SOFT_TOKENS} is {tokens}, but the tower gives {side} x {side} "
            "(model_args.msfa_output_resolution)"
        )
    vision = MobileNetConfig(
        d_tower=width,
        d_stem=whole(args, _ARGS + "stem_size"),
        stages=_stages(inner[f"{PART}.architecture"], args[_ARGS + "arch_def"]),
        image_size=MOBILENET_V5_300M.image_size,
        num_soft_tokens=tokens,
        **{field: whole(outer, key) for field, key in TOKENS.items()},
    )
    return vision, vocabulary_from_hf(inner, PART)


def mobilenet_to_hf(vision: MobileNetConfig, vocabulary: ModalityVocabulary) -> Json:
    """The keys that `mobilenet_from_hf` reads.

    Raises:
      ValueError: timm has no such tower.
    """
    plain = replace(
        MOBILENET_V5_300M,
        **{name: getattr(vision, name) for name in (*TOKENS, "image_size", "images")},
    )
    facts = ("norm_eps", "fusion_expansion")
    if odd := [name for name in facts if getattr(vision, name) != getattr(plain, name)]:
        raise ValueError(f"MobileNetV5 of timm has no other {' and no other '.join(odd)}")
    args = {
        "arch_def": blocks_to_timm(vision.stages),
        "stem_size": vision.d_stem,
        "num_features": vision.d_tower,
        "msfa_output_resolution": math.isqrt(vision.num_soft_tokens),
    }
    published = vision == plain
    inner = {
        "model_type": DEFAULTS["model_type"],
        "architecture": PUBLISHED if published else OTHER,
        "model_args": None if published else args,
        "do_pooling": False,
        "hidden_size": vision.d_tower,
    }
    return {
        PART: inner | vocabulary_to_hf(vocabulary),
        NUM_SOFT_TOKENS: vision.num_soft_tokens,
        **{key: getattr(vision, field) for field, key in TOKENS.items()},
    }


def vocabulary_from_hf(inner: Json, part: str) -> ModalityVocabulary:
    """The ids that are embedded in the width of a tower, from what `inside` says of its `part`."""
    return ModalityVocabulary(
        first_id=whole(inner, f"{part}.vocab_offset"),
        vocab_size=whole(inner, f"{part}.vocab_size"),
        width=whole(inner, f"{part}.hidden_size"),
        norm_eps=positive(inner, f"{part}.rms_norm_eps"),
    )


def vocabulary_to_hf(vocabulary: ModalityVocabulary) -> Json:
    """The keys that `vocabulary_from_hf` reads."""
    return {
        "vocab_offset": vocabulary.first_id,
        "vocab_size": vocabulary.vocab_size,
        "hidden_size": vocabulary.width,
        "rms_norm_eps": vocabulary.norm_eps,
    }


def _stages(name: object, arch_def: object):
    if arch_def is None and name == PUBLISHED:
        return MOBILENET_V5_300M.stages
    if not isinstance(name, str) or not name.startswith("mobilenetv5") or arch_def is None:
        raise ValueError(
            f"{PART}.architecture {name!r} is not supported; expected {PUBLISHED!r}, or another "
            "mobilenetv5 whose model_args.arch_def lists its blocks"
        )
    known = isinstance(arch_def, list) and all(
        isinstance(stage, list) and all(isinstance(block, str) for block in stage)
        for stage in arch_def
    )
    if not known:
        raise ValueError(f"{_ARGS}arch_def must list blocks by stage, as timm does")
    try:
        return blocks_from_timm(arch_def)
    except ValueError as error:
        raise ValueError(f"{_ARGS}arch_def: {error}") from None
