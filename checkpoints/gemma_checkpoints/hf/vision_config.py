"""The part of a `config.json` that is about images <-> `VisionConfig`.

Keys of the tower lie in `vision_config`, those of its place in the text at the top. A missing key
means the default of the transformers class, as in `config.py`.
Source: `models/{siglip/configuration_siglip,gemma3/configuration_gemma3}.py` of transformers.
"""

from collections.abc import Mapping

from gemma_jax.encoder_config import VisionConfig

from ..json_values import Json, depth, nested, positive, whole

_INSIDE = "vision_config."
KEYS: Mapping[str, str] = {
    "d_tower": _INSIDE + "hidden_size",
    "d_ff": _INSIDE + "intermediate_size",
    "num_layers": _INSIDE + "num_hidden_layers",
    "num_heads": _INSIDE + "num_attention_heads",
    "image_size": _INSIDE + "image_size",
    "patch_size": _INSIDE + "patch_size",
    "norm_eps": _INSIDE + "layer_norm_eps",
    "num_soft_tokens": "mm_tokens_per_image",
    "image_token": "image_token_index",
    "start_token": "boi_token_index",
    "end_token": "eoi_token_index",
}
DEFAULTS: Json = {
    _INSIDE + "model_type": "siglip_vision_model",
    _INSIDE + "hidden_size": 768,
    _INSIDE + "intermediate_size": 3_072,
    _INSIDE + "num_hidden_layers": 12,
    _INSIDE + "num_attention_heads": 12,
    _INSIDE + "image_size": 224,
    _INSIDE + "patch_size": 16,
    _INSIDE + "layer_norm_eps": 1e-6,
    _INSIDE + "hidden_act": "gelu_pytorch_tanh",
    _INSIDE + "num_channels": 3,
    _INSIDE + "vision_use_head": True,
    "mm_tokens_per_image": 256,
    "image_token_index": 262_144,
    "boi_token_index": 255_999,
    "eoi_token_index": 256_000,
}
# What every tower here is.
FIXED: Json = {
    _INSIDE + "model_type": "siglip_vision_model",
    _INSIDE + "hidden_act": "gelu_pytorch_tanh",
    _INSIDE + "num_channels": 3,
    _INSIDE + "vision_use_head": False,
}
_READERS = {"num_layers": depth, "norm_eps": positive}


def vision_from_hf(raw: Json) -> VisionConfig:
    """The tower that the `config.json` of a model with images declares.

    Raises:
      ValueError: no `vision_config`, another kind of tower, or a value of the wrong type.
    """
    tower = nested(raw, "vision_config")
    if not tower:
        raise ValueError(
            f"vision_config is missing: a {raw['model_type']!r} model has one; the model_type of "
            "a text decoder alone is 'gemma3_text'"
        )
    # transformers takes `image_token_id` for `image_token_index`, and so on.
    renamed = {key.replace("_token_id", "_token_index"): value for key, value in raw.items()}
    given = renamed | raw | {_INSIDE + key: value for key, value in tower.items()}
    values = DEFAULTS | given
    for key, expected in FIXED.items():
        if values[key] != expected:
            default = "" if key in given else " by default"
            raise ValueError(
                f"{key} is {values[key]!r}{default}, which is not supported; expected {expected!r}"
            )
    return VisionConfig(
        **{field: _READERS.get(field, whole)(values, key) for field, key in KEYS.items()}
    )


def vision_to_hf(vision: VisionConfig) -> Json:
    """The keys that `vision_from_hf` reads."""
    values = FIXED | {key: getattr(vision, field) for field, key in KEYS.items()}
    inside = {k.removeprefix(_INSIDE): v for k, v in values.items() if k.startswith(_INSIDE)}
    top = {key: value for key, value in values.items() if not key.startswith(_INSIDE)}
    return top | {"vision_config": inside}
