"""`GemmaConfig` -> keys of a GGUF header, as llama.cpp's converter writes them.

Source: `set_gguf_parameters` of the Gemma classes of `conversion/gemma.py` of llama.cpp
(November 2026). What the format cannot say is found by reading the keys back.
"""

import math
from dataclasses import fields, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from gemma_jax.config import GemmaConfig, LayerSpec

from .config import FAMILIES, config_from_gguf


def architecture(cfg: GemmaConfig) -> str:
    """Its name in llama.cpp."""
    if cfg.altup is not None:
        return "gemma3n"
    if cfg.qk_norm:
        return "gemma3"
    return "gemma2" if cfg.post_norms else "gemma"


def query_factor(cfg: GemmaConfig) -> float:
    """What queries have to be multiplied by, so that a program that knows nothing of the config's
    `query_pre_attn_scalar` computes the same scores. It goes into the norm of queries."""
    if architecture(cfg) != "gemma3":
        return 1.0
    return math.sqrt(_implied_scalar(cfg) / cfg.query_pre_attn_scalar)


def _implied_scalar(cfg: GemmaConfig) -> int:
    is_27b = len(cfg.layers) == FAMILIES["gemma3"].layers_of_27b
    return cfg.d_model // cfg.num_heads if is_27b else cfg.head_dim


def add_config(writer: Any, cfg: GemmaConfig, file_type: int) -> None:
    """Puts the keys of the architecture into a `GGUFWriter` that was made for it.

    Raises:
      ValueError: The keys cannot say all of the config, by the names of its fields.
    """
    import gguf

    arch, layers = architecture(cfg), cfg.layers
    local, wide = _first(cfg, "local"), _first(cfg, "global")
    theta = (wide or layers[0]).rope_theta
    widths = [spec.d_ff for spec in layers]
    writer.add_block_count(len(layers))
    writer.add_context_length(cfg.max_positions)
    writer.add_embedding_length(cfg.d_model)
    one_width = len(set(widths)) == 1 and arch != "gemma3n"
    writer.add_feed_forward_length(widths[0] if one_width else widths)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    if wide is not None and wide.rope_scale != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(wide.rope_scale)
    if arch in ("gemma3", "gemma3n"):
        writer.add_rope_freq_base(theta)
        own_theta = FAMILIES[arch].local_theta if local is None else local.rope_theta
        writer.add_float32(f"{arch}.rope.freq_base_swa", own_theta)
    elif theta != 10_000:
        writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_file_type(file_type)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(cfg.attn_soft_cap or 0.0)
    if arch in ("gemma2", "gemma3n") or cfg.final_soft_cap is not None:
        writer.add_final_logit_softcapping(cfg.final_soft_cap or 0.0)
    if arch != "gemma":
        writer.add_sliding_window(0 if local is None else local.window)
    is_local = [spec.kind == "local" for spec in layers]
    period = FAMILIES[arch].period
    usual = [local is not None and i % period < period - 1 for i in range(len(layers))]
    if arch == "gemma3n":
        _add_gemma3n(writer, cfg)
    if arch == "gemma3n" or (is_local != usual and any(is_local)):
        writer.add_sliding_window_pattern(is_local)
    _refuse_what_is_lost(writer, cfg)


def _add_gemma3n(writer: Any, cfg: GemmaConfig) -> None:
    assert cfg.altup is not None and cfg.per_layer is not None
    writer.add_altup_active_idx(cfg.altup.active)
    writer.add_altup_num_inputs(cfg.altup.num_streams)
    writer.add_embedding_length_per_layer_input(cfg.per_layer.width)
    writer.add_shared_kv_layers(sum(spec.kv == "shared" for spec in cfg.layers))
    writer.add_activation_sparsity_scale(
        [_quantile(spec.sparsity) if spec.sparsity else -math.inf for spec in cfg.layers]
    )


def _quantile(share: float) -> float:
    """Of the normal distribution, with float32's roundings in the converter's places."""
    doubled = np.float32(2) * np.float32(share) - np.float32(1)
    inverse = np.float32(NormalDist().inv_cdf((float(doubled) + 1) / 2) / math.sqrt(2))
    return float(inverse * np.float32(math.sqrt(2)))


def _first(cfg: GemmaConfig, kind: str) -> LayerSpec | None:
    return next((spec for spec in cfg.layers if spec.kind == kind), None)


def _refuse_what_is_lost(writer: Any, cfg: GemmaConfig) -> None:
    """Reads the keys back, as they are stored."""
    keys = {key: _stored(entry) for key, entry in writer.kv_data[0].items()}
    keys = {key: value for key, value in keys.items() if not key.startswith("general.sampling")}
    again = config_from_gguf(
        keys,
        cfg.vocab_size,
        laurel_rank=cfg.laurel_rank,
        per_layer_rows=cfg.per_layer and cfg.per_layer.vocab_size,
    )
    again = replace(again, tied_head=cfg.tied_head)
    if architecture(cfg) == "gemma3":  # see `query_factor`
        again = replace(again, query_pre_attn_scalar=cfg.query_pre_attn_scalar)
    lost = [
        f.name for f in fields(cfg) if f.compare and getattr(cfg, f.name) != getattr(again, f.name)
    ]
    if lost:
        raise ValueError(
            f"a GGUF file of a {architecture(cfg)} cannot say this model's {', '.join(lost)}"
        )


def _stored(entry: Any) -> Any:
    value = entry.value
    if entry.type.name == "FLOAT32":
        return float(np.float32(value))
    return (
        [float(np.float32(v)) if isinstance(v, float) else v for v in value]
        if isinstance(value, list)
        else value
    )
