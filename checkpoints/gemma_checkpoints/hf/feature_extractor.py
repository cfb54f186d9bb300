"""The settings of a `Gemma3nAudioFeatureExtractor` <-> `SoundProcessing`.

transformers reads lengths in milliseconds. It writes those in samples beside them, and computes
them anew when it loads: numbers that do not fit are refused, for they would have no effect there.
Source: `models/gemma3n/feature_extraction_gemma3n.py` of transformers 5.24.
"""

import math
from collections.abc import Mapping
from typing import Any

from gemma_jax.encoder_config import AudioConfig, SoundProcessing

from ..json_values import Json, flag, positive, whole

CLASS = "Gemma3nAudioFeatureExtractor"
NUMBERS: Mapping[str, str] = {
    "min_frequency": "min_frequency",
    "max_frequency": "max_frequency",
    "mel_floor": "mel_floor",
}
USED = frozenset([
    *NUMBERS.values(), "sampling_rate", "feature_size", "frame_length_ms", "hop_length_ms",
    "frame_length", "hop_length", "fft_length", "fft_overdrive", "preemphasis", "audio_seq_length",
])  # fmt: skip
IRRELEVANT: Mapping[str, str] = {"return_attention_mask": "what transformers returns"}
# Key -> values besides null that change nothing; any other is refused.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "padding_value": (0,),
    "padding_side": ("right",),
    "dither": (0,),
    "input_scale_factor": (1,),
    "preemphasis_htk_flavor": (True,),
    "per_bin_mean": (),
    "per_bin_stddev": (),
}
FRAME_MS, HOP_MS = 32.0, 10.0
DEFAULT = SoundProcessing()


def sounds_from_hf(raw: Json, audio: AudioConfig) -> SoundProcessing:
    """How sounds are prepared for a tower, by the settings that are not null.

    Raises:
      ValueError: settings for another tower, or impossible ones.
    """
    raw = {key: value for key, value in raw.items() if value is not None}
    if (kind := raw.get("feature_extractor_type", CLASS)) != CLASS:
        raise ValueError(f"feature_extractor_type {kind!r} is not {CLASS}")
    for key, expected in (("feature_size", audio.num_mels), ("audio_seq_length",
                                                             audio.num_soft_tokens)):  # fmt: skip
        if (found := raw.get(key, expected)) != expected:
            raise ValueError(f"{key} {found!r:.80} is not that of the tower, {expected}")
    rate = whole({"sampling_rate": DEFAULT.sampling_rate} | raw, "sampling_rate")
    given = {"frame_length_ms": FRAME_MS, "hop_length_ms": HOP_MS} | raw
    frame, hop = (round(rate * positive(given, key) / 1_000)
                  for key in ("frame_length_ms", "hop_length_ms"))  # fmt: skip
    fft = _power_of_2(frame) * (2 if flag(raw, "fft_overdrive", default=True) else 1)
    lengths = {"frame_length": frame, "hop_length": hop, "fft_length": fft}
    for key, length in lengths.items():
        if (found := raw.get(key, length)) != length:
            raise ValueError(
                f"{key} {found!r:.80} has no effect in transformers, which makes it {length} of "
                "frame_length_ms and hop_length_ms; remove it"
            )
    defaults = {key: getattr(DEFAULT, field) for field, key in NUMBERS.items()}
    return SoundProcessing(
        sampling_rate=rate,
        preemphasis=_preemphasis(raw),
        **lengths,
        **{field: positive(defaults | raw, key) for field, key in NUMBERS.items()},
    )


def sounds_to_hf(audio: AudioConfig) -> Json:
    """The settings that `sounds_from_hf` reads.

    Raises:
      ValueError: transformers cannot be told so.
    """
    sounds = audio.sounds
    raw = {
        "feature_extractor_type": CLASS,
        "feature_size": audio.num_mels,
        "sampling_rate": sounds.sampling_rate,
        "frame_length_ms": 1_000 * sounds.frame_length / sounds.sampling_rate,
        "hop_length_ms": 1_000 * sounds.hop_length / sounds.sampling_rate,
        "fft_overdrive": sounds.fft_length != _power_of_2(sounds.frame_length),
        "preemphasis": sounds.preemphasis,
        **{key: getattr(sounds, field) for field, key in NUMBERS.items()},
    }
    try:
        said = sounds_from_hf(raw, audio)
    except ValueError as error:
        raise ValueError(f"sounds: {error}") from None
    if said != sounds:
        raise ValueError(f"transformers prepares no sounds as {sounds} says")
    return raw


def _power_of_2(length: int) -> int:
    """The next one."""
    return 2 ** math.ceil(math.log2(max(1, length)))


def _preemphasis(raw: Json) -> float:
    """0 is none."""
    value = raw.get("preemphasis", DEFAULT.preemphasis)
    return (
        0.0
        if value == 0 and not isinstance(value, bool)
        else positive({"preemphasis": value}, "preemphasis")
    )
