"""How pictures and sounds are prepared: `preprocessor_config.json`, `processor_config.json`.

A nested `image_processor` or `feature_extractor` of the second file comes before the first file, as
in `image_processing_base.py`. Gemma 3n has SigLIP's image processor, with others of its defaults.
Source: `models/gemma3/{image_processing,processing}_gemma3.py`, `models/siglip/
image_processing_siglip.py` and `models/gemma3n/processing_gemma3n.py` of transformers 5.24.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_jax.config import GemmaConfig
from gemma_jax.encoder_config import (
    RESAMPLING,
    UNIT_RANGE,
    ImageProcessing,
    MobileNetConfig,
    SoundProcessing,
    VisionConfig,
)
from gemma_jax.mobilenet_presets import MOBILENET_V5_300M

from ..errors import CheckpointError
from ..json_values import Json, nested, positive, read_json, whole
from . import feature_extractor as sounds

INPUTS, PROCESSOR = "preprocessor_config.json", "processor_config.json"
USED = frozenset(
    "size image_mean image_std rescale_factor resample do_rescale do_normalize do_pan_and_scan "
    "pan_and_scan_min_crop_size pan_and_scan_max_num_crops pan_and_scan_min_ratio_to_activate "
    "image_seq_length".split()
)
# Key -> why it changes no pixel here.
IRRELEVANT: Mapping[str, str] = {
    "processor_class": "names a class of transformers; the keys are read by their meaning",
    "image_processor_type": "held against the classes below",
    "feature_extractor_type": "as above",
    "transformers_version": "how the file came about",
    "do_convert_rgb": "every picture becomes RGB here",
    "data_format": "the tower reads channels first",
    "input_data_format": "pictures are decoded here",
    "default_to_square": "the size is written out",
    "device": "where transformers computes",
    "disable_grouping": "how transformers computes",
    "return_tensors": "what transformers returns",
    "chat_template": "read with the tokenizer",
    "feature_extractor": "its keys are read as those of preprocessor_config.json",
    "image_processor": "its keys are read as those of preprocessor_config.json",
    "tokenizer": "read with the tokenizer",
    "video_processor": "no model here reads videos",
}
# Key -> values besides null that change nothing; any other is refused.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "auto_map": ({},),  # code of its own
    "do_resize": (True,),
    "do_center_crop": (False,),
    "do_pad": (False,),
    "crop_size": (),
    "pad_size": (),
    "image_token": ("<image_soft_token>",),
    "boi_token": ("<start_of_image>",),
    "eoi_token": ("<end_of_image>",),
}
CLASSES = (
    "Gemma3ImageProcessor",
    "Gemma3ImageProcessorFast",
    "ShieldGemma2ImageProcessor",
    "ShieldGemma2ImageProcessorFast",
)
SIGLIP_CLASSES = ("SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil")
# What SigLIP's class does where a file that speaks of images does not say it.
SIGLIP_DEFAULTS: Json = {
    "size": {"height": 224, "width": 224},
    "resample": RESAMPLING.index("bicubic"),
}
PAN_AND_SCAN = tuple(sorted(key for key in USED if "pan_and_scan" in key))
OF_IMAGES = {*USED, "image_processor_type", "do_convert_rgb", "do_resize"} - {"image_seq_length"}
OF_SOUNDS = {*sounds.USED, "feature_extractor_type", *sounds.NEUTRAL} - {"audio_seq_length"}


def with_processor(cfg: GemmaConfig, folder: Path) -> GemmaConfig:
    """The config of a folder with what its files say of pictures and sounds.

    Raises:
      CheckpointError: A file asks for what this library does not do; the message names the key.
    """
    if cfg.vision is None and cfg.audio is None:
        return cfg
    where = folder / PROCESSOR
    outer = read_json(where) if where.is_file() else {}
    gemma3n = not isinstance(cfg.vision, VisionConfig)
    try:
        _refuse(outer, gemma3n)
        lengths = {"image_seq_length": cfg.vision, "audio_seq_length": cfg.audio}
        for key, tower in lengths.items():
            _check_length(outer, key, tower)
        images, extractor = nested(outer, "image_processor"), nested(outer, "feature_extractor")
        for raw in (images, extractor if gemma3n else {}):
            _refuse(raw, gemma3n)
        first = {}
        if not (images and (extractor or cfg.audio is None)) and (folder / INPUTS).is_file():
            where = folder / INPUTS
            first = read_json(where)
            _refuse(first, gemma3n)
        return _with_settings(cfg, images or first, extractor or first)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(where, str(error)) from None


def without_processor(cfg: GemmaConfig) -> GemmaConfig:
    """The config as it is without such files."""
    vision, audio = cfg.vision, cfg.audio
    match vision:
        case VisionConfig():
            vision = replace(vision, images=ImageProcessing())
        case MobileNetConfig():
            size = MOBILENET_V5_300M.image_size
            vision = replace(vision, images=UNIT_RANGE, image_size=size)
    if audio is not None:
        audio = replace(audio, sounds=SoundProcessing())
    return replace(cfg, vision=vision, audio=audio)


def says_processor(folder: Path, cfg: GemmaConfig) -> bool:
    """Whether the files in a folder prepare pictures and sounds as this config does."""
    try:
        return with_processor(without_processor(cfg), folder) == cfg
    except ValueError:
        return False


def _with_settings(cfg: GemmaConfig, images: Json, extractor: Json) -> GemmaConfig:
    vision, audio = cfg.vision, cfg.audio
    match vision:
        case VisionConfig():
            _check_size(images.get("size"), vision.image_size)
            _check_length(images, "image_seq_length", vision)
            vision = replace(vision, images=_images(images, CLASSES))
        case MobileNetConfig():
            _check_length(images, "image_seq_length", vision)
            if OF_IMAGES & {key for key, value in images.items() if value is not None}:
                vision = _with_siglip(vision, images)
    if audio is not None:
        audio = replace(audio, sounds=sounds.sounds_from_hf(
            {key: value for key, value in extractor.items() if key in OF_SOUNDS}, audio
        ))  # fmt: skip
        _check_length(extractor, "audio_seq_length", audio)
    return replace(cfg, vision=vision, audio=audio)


def _with_siglip(vision: MobileNetConfig, raw: Json) -> MobileNetConfig:
    """A tower whose images are prepared by SigLIP's class, which says how large they are."""
    raw = SIGLIP_DEFAULTS | {key: value for key, value in raw.items() if value is not None}
    size = raw["size"]
    if not isinstance(size, dict) or set(size) != {"height", "width"}:
        raise ValueError(f"size {size!r:.80} must be a height and a width")
    side = whole(size, "height")
    if size["width"] != side:
        raise ValueError(f"size {size!r:.80}: the tower reads squares")
    return replace(vision, image_size=side, images=_images(raw, SIGLIP_CLASSES))


def _images(raw: Json, classes: tuple[str, ...]) -> ImageProcessing:
    if (kind := raw.get("image_processor_type")) not in (None, *classes):
        raise ValueError(f"image_processor_type {kind!r} is not one of {', '.join(classes)}")
    default = ImageProcessing()
    scaled, normal = _switch(raw, "do_rescale", True), _switch(raw, "do_normalize", True)
    return ImageProcessing(
        rescale=_number(raw, "rescale_factor", default.rescale) if scaled else 1.0,
        mean=_channels(raw, "image_mean") or default.mean if normal else (0.0, 0.0, 0.0),
        std=_channels(raw, "image_std") or default.std if normal else (1.0, 1.0, 1.0),
        resample=_resample(raw.get("resample")),
        pan_and_scan=_switch(raw, "do_pan_and_scan", False),
        min_crop_size=_whole(raw, "pan_and_scan_min_crop_size", default.min_crop_size),
        max_num_crops=_whole(raw, "pan_and_scan_max_num_crops", default.max_num_crops),
        min_ratio=_number(raw, "pan_and_scan_min_ratio_to_activate", default.min_ratio),
    )


def _refuse(raw: Json, gemma3n: bool) -> None:
    """Raises `ValueError` for what such a model's processor does not know, or cannot do here."""
    used = {*USED, *sounds.USED} - {*PAN_AND_SCAN} if gemma3n else USED
    irrelevant = IRRELEVANT | (sounds.IRRELEVANT if gemma3n else {})
    neutral = NEUTRAL | (sounds.NEUTRAL | {"do_pan_and_scan": (False,)} if gemma3n else {})
    for key, value in raw.items():
        if value is None or key in used or key in irrelevant:
            continue
        if key not in neutral:
            raise ValueError(f"{key!r} is not known here: it may change what the model sees")
        if value not in neutral[key]:
            raise ValueError(f"{key} is {value!r:.80}, which is not supported")


def _check_size(size: Any, expected: int) -> None:
    """transformers takes one number for both sides as well."""
    if size is None:
        return
    sides = set(size.values()) if isinstance(size, dict) else {size}
    known = not isinstance(size, dict) or set(size) <= {"height", "width"}
    if sides != {expected} or not known:
        raise ValueError(f"size {size!r:.80} is not that of the tower, {expected} x {expected}")


def _check_length(raw: Json, key: str, tower: Any) -> None:
    expected = None if tower is None else tower.num_soft_tokens
    if expected is not None and (length := raw.get(key)) not in (None, expected):
        raise ValueError(f"{key} {length!r:.80} is not that of the tower, {expected}")


def _resample(value: Any) -> str:
    if value is None:
        return "bilinear"
    if not isinstance(value, int) or not 0 <= value < len(RESAMPLING):
        raise ValueError(f"resample must be a number of Pillow's, 0 to 5, got {value!r:.80}")
    return RESAMPLING[value]


def _channels(raw: Json, key: str) -> tuple[float, float, float] | None:
    """One number for all channels, or three."""
    value = raw.get(key)
    if value is None:
        return None
    values = value if isinstance(value, list) else [value] * 3
    if len(values) != 3 or not all(type(one) in (int, float) for one in values):
        raise ValueError(f"{key} must be three numbers, got {value!r:.80}")
    red, green, blue = map(float, values)
    return red, green, blue


def _switch(raw: Json, key: str, default: bool) -> bool:
    value = raw.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{key} must be true or false, got {value!r:.80}")
    return default if value is None else value


def _number(raw: Json, key: str, default: float) -> float:
    return default if raw.get(key) is None else positive(raw, key)


def _whole(raw: Json, key: str, default: int) -> int:
    return default if raw.get(key) is None else whole(raw, key)
