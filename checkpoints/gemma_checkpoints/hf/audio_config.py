"""The part of a Gemma 3n's `config.json` that is about sounds <-> `AudioConfig`.

How waveforms are prepared is not in this file: `processor_config.py` reads it.
Source: `Gemma3nAudioConfig` and `modeling_gemma3n.py` of transformers 5.24.
"""

from collections.abc import Mapping

from gemma_jax.config import ModalityVocabulary
from gemma_jax.encoder_config import AudioConfig

from ..json_values import Json, depth, inside, positive, whole
from .mobilenet_config import vocabulary_from_hf, vocabulary_to_hf

PART = "audio_config"
_IN = PART + "."
DEFAULTS: Json = {
    "model_type": "gemma3n_audio",
    "vocab_size": 128,
    "vocab_offset": 262_272,
    "input_feat_size": 128,
    "hidden_size": 1_536,
    "rms_norm_eps": 1e-6,
    "gradient_clipping": 1e10,
    "conf_attention_context_left": 13,
    "conf_attention_context_right": 0,
    "conf_attention_logit_cap": 50.0,
    "conf_num_attention_heads": 8,
    "conf_num_hidden_layers": 12,
    "conf_conv_kernel_size": 5,
    "conf_reduction_factor": 4,
    "conf_residual_weight": 0.5,
    "sscp_conv_channel_size": [128, 32],
    "sscp_conv_group_norm_eps": 1e-3,
    "sscp_conv_kernel_size": [[3, 3], [3, 3]],
    "sscp_conv_stride_size": [[2, 2], [2, 2]],
}
# What every tower here is.
FIXED = ("model_type", "conf_attention_context_right", "sscp_conv_stride_size")
WHOLE: Mapping[str, str] = {
    "d_tower": "hidden_size",
    "num_heads": "conf_num_attention_heads",
    "num_mels": "input_feat_size",
    "left_context": "conf_attention_context_left",
    "depthwise_kernel": "conf_conv_kernel_size",
    "reduction": "conf_reduction_factor",
}
NUMBERS: Mapping[str, str] = {
    "conv_norm_eps": "sscp_conv_group_norm_eps",
    "score_cap": "conf_attention_logit_cap",
    "residual_weight": "conf_residual_weight",
    "clip": "gradient_clipping",
    "norm_eps": "rms_norm_eps",
}
LAYERS, CHANNELS, KERNELS = (
    "conf_num_hidden_layers", "sscp_conv_channel_size", "sscp_conv_kernel_size"
)  # fmt: skip
TOKENS: Mapping[str, str] = {
    "num_soft_tokens": "audio_soft_tokens_per_image",
    "audio_token": "audio_token_id",
    "start_token": "boa_token_id",
    "end_token": "eoa_token_id",
}
OUTER_DEFAULTS: Json = {
    "audio_soft_tokens_per_image": 188,
    "audio_token_id": 262_273,
    "boa_token_id": 256_000,
    "eoa_token_id": 262_272,
}


def audio_from_hf(raw: Json) -> tuple[AudioConfig, ModalityVocabulary]:
    """The tower that a `config.json` declares, and the ids that are embedded in its width.

    Raises:
      ValueError: another kind of tower, or a value that is impossible.
    """
    inner, outer = inside(raw, PART, DEFAULTS), OUTER_DEFAULTS | raw
    for key in FIXED:
        if (found := inner[_IN + key]) != (expected := DEFAULTS[key]):
            raise ValueError(
                f"{_IN}{key} is {found!r:.80}, which is not supported; expected {expected!r}"
            )
    channels = inner[_IN + CHANNELS]
    if not isinstance(channels, list) or len(channels) != 2:
        raise ValueError(f"{_IN}{CHANNELS} must be two numbers, got {channels!r:.80}")
    audio = AudioConfig(
        num_layers=depth(inner, _IN + LAYERS),
        conv_channels=tuple(whole({_IN + CHANNELS: one}, _IN + CHANNELS) for one in channels),
        conv_kernel=_kernel(inner[_IN + KERNELS]),
        **{field: whole(inner, _IN + key) for field, key in WHOLE.items()},
        **{field: positive(inner, _IN + key) for field, key in NUMBERS.items()},
        **{field: whole(outer, key) for field, key in TOKENS.items()},
    )
    return audio, vocabulary_from_hf(inner, PART)


def audio_to_hf(audio: AudioConfig, vocabulary: ModalityVocabulary) -> Json:
    """The keys that `audio_from_hf` reads.

    Raises:
      ValueError: Two numbers differ that are one for transformers.
    """
    if audio.norm_eps != vocabulary.norm_eps:
        raise ValueError(
            f"the audio tower's norm_eps={audio.norm_eps} and that of its vocabulary, "
            f"{vocabulary.norm_eps}, are one number for transformers"
        )
    inner = {key: DEFAULTS[key] for key in FIXED}
    inner |= {key: getattr(audio, field) for field, key in {**WHOLE, **NUMBERS}.items()}
    inner |= {
        LAYERS: audio.num_layers,
        CHANNELS: list(audio.conv_channels),
        KERNELS: [[audio.conv_kernel] * 2] * 2,
    }
    return {
        PART: inner | vocabulary_to_hf(vocabulary),
        **{key: getattr(audio, field) for field, key in TOKENS.items()},
    }


def _kernel(value: object) -> int:
    """The one side that all windows have."""
    rows = value if isinstance(value, list) else []
    sides = [one for row in rows if isinstance(row, list) for one in row]
    if [len(row) for row in rows if isinstance(row, list)] != [2, 2] or sides.count(sides[0]) != 4:
        raise ValueError(
            f"{_IN}{KERNELS} is {value!r:.80}, which is not supported; expected two squares of one "
            "size"
        )
    return whole({_IN + KERNELS: sides[0]}, _IN + KERNELS)
