"""How pictures are prepared: `preprocessor_config.json` and `processor_config.json`.

Source: `models/gemma3/{image_processing,processing}_gemma3.py` of transformers 5.24; a nested
`image_processor` of the second file comes before the first file, as in `image_processing_base.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gemma_jax.config import GemmaConfig
from gemma_jax.encoder_config import RESAMPLING, ImageProcessing, VisionConfig

from ..errors import CheckpointError
from ..json_values import Json, nested, positive, read_json, whole

IMAGES, PROCESSOR = "preprocessor_config.json", "processor_config.json"
USED = frozenset(
    "size image_mean image_std rescale_factor resample do_rescale do_normalize do_pan_and_scan "
    "pan_and_scan_min_crop_size pan_and_scan_max_num_crops pan_and_scan_min_ratio_to_activate "
    "image_seq_length".split()
)
# Key -> why it changes no pixel here.
IRRELEVANT: Mapping[str, str] = {
    "processor_class": "names a class of transformers; the keys are read by their meaning",
    "image_processor_type": "as above; Gemma 3's and ShieldGemma 2's do the same",
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
    "feature_extractor": "about sound, and no tower for it is read",
    "audio_seq_length": "about sound, and no tower for it is read",
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


def with_processor(cfg: GemmaConfig, folder: Path) -> GemmaConfig:
    """The config of a folder with what its files say of pictures; without a tower, as it is.

    Raises:
      CheckpointError: A file asks for what this library does not do; the message names the key.
    """
    if not isinstance(cfg.vision, VisionConfig):
        return cfg
    whole_processor = read_json(folder / PROCESSOR) if (folder / PROCESSOR).is_file() else {}
    where = folder / PROCESSOR
    try:
        _refuse(whole_processor)
        raw = nested(whole_processor, "image_processor")
        _check_length(whole_processor, cfg.vision)
        if not raw and (folder / IMAGES).is_file():
            where = folder / IMAGES
            raw = read_json(where)
        images = _images(raw, cfg.vision)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(where, str(error)) from None
    return replace(cfg, vision=replace(cfg.vision, images=images))


def _images(raw: Json, vision: VisionConfig) -> ImageProcessing:
    _refuse(raw)
    if (kind := raw.get("image_processor_type")) not in (None, *CLASSES):
        raise ValueError(f"image_processor_type {kind!r} is not one of {', '.join(CLASSES)}")
    _check_size(raw.get("size"), vision.image_size)
    _check_length(raw, vision)
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


def _refuse(raw: Json) -> None:
    for key, value in raw.items():
        if value is None or key in USED or key in IRRELEVANT:
            continue
        if key not in NEUTRAL:
            raise ValueError(f"{key!r} is not known here: it may change what the model sees")
        if value not in NEUTRAL[key]:
            raise ValueError(f"{key} is {value!r:.80}, which is not supported")


def _check_size(size: Any, expected: int) -> None:
    """transformers takes one number for both sides as well."""
    if size is None:
        return
    sides = set(size.values()) if isinstance(size, dict) else {size}
    known = not isinstance(size, dict) or set(size) <= {"height", "width"}
    if sides != {expected} or not known:
        raise ValueError(f"size {size!r:.80} is not that of the tower, {expected} x {expected}")


def _check_length(raw: Json, vision: VisionConfig) -> None:
    length = raw.get("image_seq_length")
    if length not in (None, vision.num_soft_tokens):
        raise ValueError(f"image_seq_length {length!r:.80} is not that of the tower, "
                         f"{vision.num_soft_tokens}")  # fmt: skip


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
