"""How pictures and sounds are prepared -> the files that say it, where a default would not do."""

from gemma_jax.config import GemmaConfig
from gemma_jax.encoder_config import RESAMPLING, MobileNetConfig

from ..json_values import Json
from .feature_extractor import sounds_to_hf
from .processor_config import INPUTS, PROCESSOR, without_processor


def processor_to_hf(cfg: GemmaConfig) -> dict[str, Json]:
    """File name -> content; none if the model does as is done without such files.

    Raises:
      ValueError: transformers cannot be told so.
    """
    if without_processor(cfg) == cfg:
        return {}
    gemma3n = isinstance(cfg.vision, MobileNetConfig) or cfg.audio is not None
    name = {"processor_class": "Gemma3nProcessor" if gemma3n else "Gemma3Processor"}
    inputs, lengths = dict(name), dict(name)
    if cfg.vision is not None:
        inputs |= _images_to_hf(cfg.vision)
        lengths["image_seq_length"] = cfg.vision.num_soft_tokens
    if cfg.audio is not None:
        inputs |= sounds_to_hf(cfg.audio)
        lengths["audio_seq_length"] = cfg.audio.num_soft_tokens
    return {INPUTS: inputs, PROCESSOR: lengths}


def _images_to_hf(vision) -> Json:
    images, gemma3n = vision.images, isinstance(vision, MobileNetConfig)
    scan = {
        "do_pan_and_scan": images.pan_and_scan,
        "pan_and_scan_min_crop_size": images.min_crop_size,
        "pan_and_scan_max_num_crops": images.max_num_crops,
        "pan_and_scan_min_ratio_to_activate": images.min_ratio,
    }
    if gemma3n and images.pan_and_scan:
        raise ValueError("transformers has no pan and scan for Gemma 3n")
    plain = images.mean == (0.0, 0.0, 0.0) and images.std == (1.0, 1.0, 1.0)
    return {
        "image_processor_type": "SiglipImageProcessor" if gemma3n else "Gemma3ImageProcessor",
        "size": {"height": vision.image_size, "width": vision.image_size},
        "resample": RESAMPLING.index(images.resample),
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": images.rescale,
        "do_normalize": not plain,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
        **({} if gemma3n else scan),
    }
