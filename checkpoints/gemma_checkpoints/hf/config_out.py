"""`GemmaConfig` -> `config.json` of Hugging Face, in both spellings at once.

transformers 5 reads `rope_parameters` and `layer_types`, older releases the keys of the published
files; each ignores what it does not know.
"""

from dataclasses import replace

from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.encoder_config import MobileNetConfig, VisionConfig

from ..json_values import Json
from . import layer_heads
from .audio_config import audio_to_hf
from .config import ACTIVATION_KEYS, ACTIVATIONS, ARCHITECTURES, BARE, DEFAULTS, KINDS
from .mobilenet_config import mobilenet_to_hf
from .names import is_gemma1
from .vision_config import vision_to_hf


def config_to_hf(cfg: GemmaConfig) -> Json:
    """A `config.json` that transformers reads as this architecture.

    Raises:
      ValueError: transformers has no class with these features.
    """
    text = _text_to_hf(cfg)
    if cfg.vision is None and cfg.audio is None:
        return text
    if text["model_type"] == "gemma3n_text":
        return _gemma3n_with_towers(cfg, text)
    siglip = isinstance(cfg.vision, VisionConfig) and cfg.audio is None
    if not siglip or text["model_type"] != "gemma3_text" or cfg.final_soft_cap is not None:
        raise ValueError("of models with a tower, transformers has Gemma 3 without soft caps")
    del text["architectures"]
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "tie_word_embeddings": cfg.tied_head,
        "text_config": text,
    } | vision_to_hf(cfg.vision)


def _gemma3n_with_towers(cfg: GemmaConfig, text: Json) -> Json:
    if not isinstance(cfg.vision, MobileNetConfig) or cfg.audio is None:
        raise ValueError(
            "transformers has Gemma 3n with MobileNetV5 and an audio tower, or with neither"
        )
    tokens = (cfg.vision.image_token, cfg.audio.audio_token)
    if [cfg.vocabulary_of(token) for token in tokens] != [0, 1] or len(
        cfg.modality_vocabularies
    ) != 2:
        raise ValueError(
            "in transformers' Gemma 3n the placeholder of each tower is an id of its vocabulary, "
            "that of images first"
        )
    ids_of_images, ids_of_sounds = cfg.modality_vocabularies
    del text["architectures"]
    return {
        "architectures": ["Gemma3nForConditionalGeneration"],
        "model_type": "gemma3n",
        "tie_word_embeddings": cfg.tied_head,
        "text_config": text,
        **mobilenet_to_hf(cfg.vision, ids_of_images),
        **audio_to_hf(cfg.audio, ids_of_sounds),
    }


def _text_to_hf(cfg: GemmaConfig) -> Json:
    """The same for the decoder alone."""
    family = _family(cfg)
    by_kind = {spec.kind: spec for spec in cfg.layers}
    varied = ("gemma3n_text", layer_heads.FAMILY)
    alike = {_kind_facts(spec) if family in varied else spec for spec in cfg.layers}
    if len(alike) != len(by_kind):
        raise ValueError(
            "layers of one kind differ from each other: no transformers class has that"
        )
    out: Json = {
        "architectures": [BARE if cfg.bidirectional else ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.layers[0].d_ff,
        "num_hidden_layers": len(cfg.layers),
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.norm_eps,
        "attention_bias": False,
        "tie_word_embeddings": cfg.tied_head,
        **dict.fromkeys(ACTIVATION_KEYS, _activation_name(cfg, family)),
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    ropes = {theirs: _rope(by_kind[ours]) for theirs, ours in KINDS.items() if ours in by_kind}
    if family == layer_heads.FAMILY:
        out |= {"rope_parameters": ropes}
    elif family in ("gemma3_text", "gemma3n_text"):
        out |= {"rope_parameters": ropes} | _legacy_ropes(by_kind)
    elif len({tuple(rope.items()) for rope in ropes.values()}) == 1:
        rope = next(iter(ropes.values()))
        out |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
        out |= {"rope_scaling": _legacy_scaling(rope)} if "factor" in rope else {}
    else:
        raise ValueError(
            "without QK norm this is no Gemma 3 of transformers, whose Gemma 2 and VaultGemma have "
            "one rope for all layers"
        )
    if family != "gemma":
        local = by_kind.get("local")
        theirs = {ours: name for name, ours in KINDS.items()}
        out |= {
            "layer_types": [theirs[spec.kind] for spec in cfg.layers],
            "sliding_window": _window(cfg, local, family),
            "final_logit_softcapping": cfg.final_soft_cap,
        }
    if family == layer_heads.FAMILY:
        return out | layer_heads.to_hf(cfg)
    if family != "gemma":
        out |= {
            "query_pre_attn_scalar": _int_if_whole(cfg.query_pre_attn_scalar),
            "attn_logit_softcapping": cfg.attn_soft_cap,
        }
    if cfg.bidirectional:
        out["use_bidirectional_attention"] = True
    return out | _gemma3n_to_hf(cfg) if family == "gemma3n_text" else out


def _window(cfg: GemmaConfig, local: LayerSpec | None, family: str) -> int:
    """Of a model that reads both ways from end to end; see `_window` of `config.py`."""
    if local is None:
        return DEFAULTS[family]["sliding_window"]
    return max(1, 2 * (local.window - 1)) if cfg.bidirectional else local.window


def _activation_name(cfg: GemmaConfig, family: str) -> str:
    """The first name that reads back as this activation."""
    return next(
        name
        for name, ours in ACTIVATIONS.items()
        if ours == cfg.activation and (family, name) != ("gemma", "gelu")
    )


def _kind_facts(spec: LayerSpec) -> LayerSpec:
    """What layers of one kind have in common in Gemma 3n and 4; their configs say the rest."""
    return replace(spec, d_ff=1, sparsity=0.0, kv="own")


def _gemma3n_to_hf(cfg: GemmaConfig) -> Json:
    altup = cfg.altup
    return {
        "intermediate_size": [spec.d_ff for spec in cfg.layers],
        "activation_sparsity_pattern": [float(spec.sparsity) for spec in cfg.layers],
        "num_kv_shared_layers": sum(spec.kv == "shared" for spec in cfg.layers),
        "laurel_rank": cfg.laurel_rank,
        "hidden_size_per_layer_input": cfg.per_layer.width,
        "vocab_size_per_layer_input": cfg.per_layer.vocab_size,
        "altup_num_inputs": altup.num_streams,
        "altup_active_idx": altup.active,
        "altup_coef_clip": altup.coef_clip,
        "altup_correct_scale": altup.correct_scale,
    }


def _family(cfg: GemmaConfig) -> str:
    """The transformers class with the switches of `cfg`."""
    parts = (cfg.altup, cfg.laurel_rank, cfg.per_layer, cfg.v_norm, not cfg.scale_plus_one)
    is_gemma3 = cfg.qk_norm and cfg.post_norms and cfg.attn_soft_cap is None and not any(parts)
    if cfg.bidirectional and not is_gemma3:
        raise ValueError("of models that read both ways, transformers has Gemma 3 alone")
    if all(parts) and cfg.qk_norm and cfg.post_norms and cfg.query_pre_attn_scalar == 1:
        return "gemma3n_text"
    if layer_heads.is_gemma4(cfg):
        return layer_heads.FAMILY
    if any("layer_scale" in cfg.sub_blocks_of(spec) for spec in cfg.layers) or any(
        cfg.heads_of(spec) != (cfg.head_dim, cfg.num_kv_heads)
        or spec.rotary_share != 1
        or spec.values == "keys"
        for spec in cfg.layers
    ):
        raise ValueError("transformers has heads by layer and layer scales in Gemma 4 alone")
    if any(parts) or any(spec.sparsity or spec.kv != "own" for spec in cfg.layers):
        raise ValueError("transformers has parts of Gemma 3n only all together")
    if cfg.qk_norm and cfg.post_norms and cfg.attn_soft_cap is None:
        return "gemma3_text"
    if not cfg.qk_norm:
        return "gemma2" if cfg.post_norms else "gemma" if is_gemma1(cfg) else "vaultgemma"
    odd = [f"attn_soft_cap={cfg.attn_soft_cap}"] if cfg.attn_soft_cap is not None else []
    odd += [] if cfg.post_norms else ["post_norms=False"]
    raise ValueError(
        "no transformers class has these features together: qk_norm=True fits Gemma 3 alone, but "
        f"not {', '.join(odd)}"
    )


def _rope(spec: LayerSpec) -> Json:
    scaling = {} if spec.rope_scale == 1 else {"factor": spec.rope_scale}
    kind = {"rope_type": "linear" if scaling else "default"}
    if spec.rotary_share != 1:
        kind = {"rope_type": "proportional", "partial_rotary_factor": spec.rotary_share}
    return kind | {"rope_theta": spec.rope_theta} | scaling


def _legacy_scaling(rope: Json) -> Json:
    return {key: rope[key] for key in ("rope_type", "factor")}


def _legacy_ropes(by_kind: dict[str, LayerSpec]) -> Json:
    """The published spelling of the same ropes, for transformers before 5."""
    out = {}
    if "local" in by_kind:
        out["rope_local_base_freq"] = by_kind["local"].rope_theta
    if "global" in by_kind:
        rope = _rope(by_kind["global"])
        out["rope_theta"] = rope["rope_theta"]
        out["rope_scaling"] = _legacy_scaling(rope) if "factor" in rope else None
    return out


def _int_if_whole(value: float) -> float:
    """transformers 5 checks types, and wants a whole number here."""
    return int(value) if value == int(value) else value
