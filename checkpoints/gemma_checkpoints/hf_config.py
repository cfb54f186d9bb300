"""`config.json` of Hugging Face -> `GemmaConfig`; `hf_config_out.py` is the way back.

Two spellings are in the wild and both are read: published files (`rope_theta`,
`rope_local_base_freq`, `rope_scaling`, `sliding_window_pattern`) and those that transformers 5
writes (`layer_types`, `rope_parameters`). A key that is missing means the default of the
transformers class, which the published multimodal configs rely on.
Source: `models/gemma{,2,3}/configuration_gemma{,2,3}.py` of transformers.
"""

from collections.abc import Mapping

from gemma_jax.config import GemmaConfig, LayerSpec

from .hf_vision_config import vision_from_hf
from .json_values import Json, depth, nested, positive, whole

_COMMON = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_bidirectional_attention": False,
}
DEFAULTS: Mapping[str, Json] = {
    "gemma": _COMMON
    | {
        "vocab_size": 256_000,
        "hidden_size": 3_072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8_192,
    },
    "gemma2": _COMMON
    | {
        "vocab_size": 256_000,
        "hidden_size": 2_304,
        "intermediate_size": 9_216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 8_192,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4_096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3_text": _COMMON
    | {
        "vocab_size": 262_208,
        "hidden_size": 2_304,
        "intermediate_size": 9_216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4_096,
        "final_logit_softcapping": None,
    },
}
ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# Layers of a period, of which the last is global.
PATTERN = {"gemma": 1, "gemma2": 2, "gemma3_text": 6}
THETA = {"global": 1_000_000.0, "local": 10_000.0}
KINDS = {"full_attention": "global", "sliding_attention": "local"}
# Models with a tower around a `gemma3_text`. ShieldGemma 2 differs in what it was trained for.
MULTIMODAL = ("gemma3", "shieldgemma2")


def text_config(raw: Json) -> Json:
    """The part of a config that describes the text decoder, as a `gemma3_text` config if need be.

    `Gemma3ForConditionalGeneration` never applies `final_logit_softcapping`, so it is cleared.
    """
    if raw.get("model_type") not in MULTIMODAL:
        return raw
    inner = nested(raw, "text_config")
    if (kind := inner.get("model_type", "gemma3_text")) != "gemma3_text":
        raise ValueError(f"model_type {kind!r} of text_config is not 'gemma3_text'")
    tied = {"tie_word_embeddings": raw.get("tie_word_embeddings", True)}
    fixed = {"model_type": "gemma3_text", "architectures": [ARCHITECTURES["gemma3_text"]]}
    return inner | tied | fixed | {"final_logit_softcapping": None}


def config_from_hf(raw: Json) -> GemmaConfig:
    """The architecture that a `config.json` declares.

    Raises:
      ValueError: a model type, activation, rope type or switch that this library does not have, or
        a value of the wrong type. Nothing is guessed.
    """
    text = text_config(raw)
    family = text.get("model_type")
    if family not in tuple(DEFAULTS):
        raise ValueError(
            f"model_type {raw.get('model_type')!r} is not supported; "
            f"expected one of: {', '.join([*DEFAULTS, *MULTIMODAL])}"
        )
    _refuse_unsupported(text)
    text = DEFAULTS[family] | text
    layers = depth(text, "num_hidden_layers")
    gemma3 = family == "gemma3_text"
    head_dim = whole(text, "head_dim")
    scalar = head_dim if family == "gemma" else positive(text, "query_pre_attn_scalar")
    specs = {kind: _layer_spec(text, kind) for kind in set(_kinds(text, layers))}
    return GemmaConfig(
        vocab_size=whole(text, "vocab_size"),
        d_model=whole(text, "hidden_size"),
        num_heads=whole(text, "num_attention_heads"),
        num_kv_heads=whole(text, "num_key_value_heads"),
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        layers=tuple(specs[kind] for kind in _kinds(text, layers)),
        max_positions=whole(text, "max_position_embeddings"),
        norm_eps=positive(text, "rms_norm_eps"),
        qk_norm=gemma3,
        post_norms=family != "gemma",
        # Gemma3Attention never applies attn_logit_softcapping, whatever its config says.
        attn_soft_cap=_cap(text, "attn_logit_softcapping") if family == "gemma2" else None,
        final_soft_cap=None if family == "gemma" else _cap(text, "final_logit_softcapping"),
        vision=vision_from_hf(raw) if raw["model_type"] in MULTIMODAL else None,
    )


def _refuse_unsupported(text: Json) -> None:
    for key in ("hidden_activation", "hidden_act"):
        # Gemma 1's published configs say "gelu", and mean the tanh approximation.
        allowed = (None, "gelu_pytorch_tanh", *(["gelu"] if text["model_type"] == "gemma" else []))
        if text.get(key) not in allowed:
            raise ValueError(f"{key} {text[key]!r} is not supported; expected 'gelu_pytorch_tanh'")
    for key in ("attention_bias", "use_bidirectional_attention", "quantization_config"):
        if text.get(key):
            raise ValueError(f"{key} is set; only models without it are supported")
    if not text.get("tie_word_embeddings", True):
        raise ValueError("tie_word_embeddings is false; only a head tied to the embedding exists")


def _kinds(text: Json, layers: int) -> list[str]:
    names = text.get("layer_types")
    if names is None:
        period = text.get("sliding_window_pattern", text.get("_sliding_window_pattern"))
        period = PATTERN[text["model_type"]] if period is None else period
        period = whole({"sliding_window_pattern": period}, "sliding_window_pattern")
        return ["local" if (i + 1) % period else "global" for i in range(layers)]
    known = isinstance(names, list) and all(name in tuple(KINDS) for name in names)
    if not known or len(names) != layers:
        raise ValueError(
            f"layer_types must hold one of {', '.join(KINDS)} for each layer ({layers})"
        )
    return [KINDS[name] for name in names]


def _layer_spec(text: Json, kind: str) -> LayerSpec:
    theta, scale = _read_rope(text, kind)
    return LayerSpec(
        kind=kind,
        window=whole(text, "sliding_window") if kind == "local" else None,
        rope_theta=theta,
        rope_scale=scale,
        d_ff=whole(text, "intermediate_size"),
    )


def _read_rope(text: Json, kind: str) -> tuple[float, float]:
    """`(theta, scale)`. Gemma 3's `rope_scaling` is for global layers only."""
    per_kind = text["model_type"] == "gemma3_text"
    name = {ours: theirs for theirs, ours in KINDS.items()}[kind]
    rope = nested(text, "rope_parameters")
    rope = nested(rope, name) if per_kind else rope
    local = per_kind and kind == "local"
    if not local:
        rope = rope | nested(text, "rope_scaling")
    theta_key = "rope_local_base_freq" if local else "rope_theta"
    default = THETA[kind] if per_kind else THETA["local"]
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "linear") or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"rope {rope} is not supported; expected rope_type 'default' or 'linear'")
    theta = positive({theta_key: rope.get("rope_theta", text.get(theta_key, default))}, theta_key)
    return theta, positive(rope, "factor") if rope_type == "linear" else 1.0


def _cap(text: Json, key: str) -> float | None:
    return None if text.get(key) is None else positive(text, key)
