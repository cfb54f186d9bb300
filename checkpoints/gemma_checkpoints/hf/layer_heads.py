"""Gemma 4: heads, ropes and widths that differ between kinds of layers, both ways.

Three spellings are read: published files name what global layers have (`global_head_dim`,
`num_global_key_value_heads`), transformers 5.24 writes `per_layer_config`, by the number of the
layer, and a missing key means the default of `Gemma4TextConfig`.

`num_global_key_value_heads` counts in models with `attention_k_eq_v` alone, as in transformers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gemma_jax.config import GemmaConfig, LayerSpec, PerLayerConfig, SubBlock

from ..json_values import Json, flag, nested, whole

FAMILY, OUTER = "gemma4_text", "gemma4"
ROTARY_SHARE = 0.25  # of global layers, where the file says nothing of them
DEFAULTS: Json = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "vocab_size": 262_144,
    "hidden_size": 2_304,
    "intermediate_size": 9_216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131_072,
    "sliding_window": 512,
    "final_logit_softcapping": None,
    "vocab_size_per_layer_input": 262_144,
    "hidden_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
    "global_head_dim": 512,
}
HEADS = ("head_dim", "num_key_value_heads")
TOWER_OF = {"image": "vision_config", "audio": "audio_config"}


def refuse_towers(raw: Json, modalities: Sequence[str]) -> None:
    """Raises `ValueError` if one of these modalities has a tower in the file: none is read yet."""
    for modality in modalities:
        if raw.get(part := TOWER_OF[modality]) is not None:
            raise ValueError(f"{part}: the {modality} tower of Gemma 4 is not supported")


def refuse_variants(text: Json) -> None:
    """Raises `ValueError` for what only other Gemma 4 models have."""
    if flag(text, "enable_moe_block", default=False):
        raise ValueError("enable_moe_block is set: mixtures of experts are not supported")
    if (reads := text.get("use_bidirectional_attention")) not in (None, "vision"):
        raise ValueError(
            f"use_bidirectional_attention {reads!r} is not supported for {FAMILY}; expected null "
            "or 'vision', which changes nothing for text"
        )


def parts(text: Json) -> dict[str, Any]:
    """The fields of a `GemmaConfig` that all Gemma 4 models share."""
    width = whole(text, "hidden_size_per_layer_input", least=0)
    table = width and PerLayerConfig(
        width=width, vocab_size=whole(text, "vocab_size_per_layer_input")
    )
    return dict(scale_plus_one=False, v_norm=True, per_layer=table or None)


def with_heads(text: Json, specs: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """The specs with the heads and widths of each layer, and its sub-blocks."""
    heads = _heads_of_layers(text, specs)
    keys_as_values = flag(text, "attention_k_eq_v", default=False)
    double = flag(text, "use_double_wide_mlp", default=False)

    def size(i: int, key: str) -> int | None:
        value = whole(heads[i], key)
        return None if value == whole(text, key) else value

    return tuple(
        replace(
            spec,
            head_dim=size(i, "head_dim"),
            num_kv_heads=size(i, "num_key_value_heads"),
            values="keys" if keys_as_values and spec.kind == "global" else "own",
            d_ff=spec.d_ff * (2 if double and not spec.makes_keys else 1),
            sub_blocks=_sub_blocks(bool(text["hidden_size_per_layer_input"])),
        )
        for i, spec in enumerate(specs)
    )


def _sub_blocks(per_layer: bool) -> tuple[SubBlock, ...]:
    return ("attention", "ffn", "per_layer", "layer_scale") if per_layer else _PLAIN


_PLAIN: tuple[SubBlock, ...] = ("attention", "ffn", "layer_scale")


def _heads_of_layers(text: Json, specs: Sequence[LayerSpec]) -> list[Json]:
    usual = {key: text[key] for key in HEADS}
    if text.get("per_layer_config") is None:
        wide = usual | {"head_dim": text["global_head_dim"]}
        if flag(text, "attention_k_eq_v", default=False):
            count = text.get("num_global_key_value_heads")
            wide["num_key_value_heads"] = usual["num_key_value_heads"] if count is None else count
        return [wide if spec.kind == "global" else usual for spec in specs]
    changed = nested(text, "per_layer_config")
    numbers = {str(i) for i in range(len(specs))}
    for number in changed:
        odd = [key for key in nested(changed, number) if key not in HEADS]
        if number not in numbers or odd:
            raise ValueError(
                f"per_layer_config.{'.'.join([number, *odd[:1]])} is not supported; expected "
                f"{' and '.join(HEADS)} of the layers 0 to {len(specs) - 1}"
            )
    return [usual | nested(changed, str(i)) for i in range(len(specs))]


def is_gemma4(cfg: GemmaConfig) -> bool:
    """Whether a config has what all Gemma 4 models share."""
    return (
        (cfg.qk_norm, cfg.post_norms, cfg.v_norm, cfg.scale_plus_one) == (True, True, True, False)
        and (cfg.altup, cfg.laurel_rank, cfg.attn_soft_cap) == (None, None, None)
        and cfg.query_pre_attn_scalar == 1
        and {cfg.sub_blocks_of(spec) for spec in cfg.layers} == {_sub_blocks(bool(cfg.per_layer))}
    )


def to_hf(cfg: GemmaConfig) -> Json:
    """The keys that `Gemma4TextConfig` has besides.

    Raises:
      ValueError: It has no place for something.
    """
    layers = cfg.layers
    wide = [spec for spec in layers if spec.kind == "global"]
    head_dim, num_kv_heads = cfg.heads_of(layers[-1])
    owners = {spec.d_ff for spec in layers if spec.makes_keys}
    sharers = {spec.d_ff for spec in layers if not spec.makes_keys}
    (width,) = owners if len(owners) == 1 else (0,)
    as_values = {spec.values == "keys" for spec in wide}
    own_count = num_kv_heads != cfg.num_kv_heads
    for wrong, what in (
        (layers[-1].kind == "local", "a last layer that is local"),
        (
            len(as_values) > 1 or (own_count and True not in as_values),
            "KV heads of such global layers",
        ),
        (any(cfg.heads_of(spec) != (head_dim, num_kv_heads) for spec in wide), "such global heads"),
        (any(_is_odd(cfg, spec) for spec in layers if spec.kind == "local"), "such local layers"),
        (not width or sharers not in (set(), {width}, {2 * width}), "such feed-forward widths"),
        (any(spec.sparsity for spec in layers), "sparsity"),
    ):
        if wrong:
            raise ValueError(f"transformers' Gemma 4 has no place for {what}")
    per_layer = cfg.per_layer or PerLayerConfig(width=1, vocab_size=cfg.vocab_size)
    return {
        "intermediate_size": width,
        "use_double_wide_mlp": sharers == {2 * width},
        "global_head_dim": head_dim,
        "attention_k_eq_v": True in as_values,
        "num_global_key_value_heads": num_kv_heads if own_count else None,
        "num_kv_shared_layers": sum(not spec.makes_keys for spec in layers),
        "hidden_size_per_layer_input": per_layer.width if cfg.per_layer else 0,
        "vocab_size_per_layer_input": per_layer.vocab_size,
        "enable_moe_block": False,
    }


def _is_odd(cfg: GemmaConfig, spec: LayerSpec) -> bool:
    usual = cfg.heads_of(spec) == (cfg.head_dim, cfg.num_kv_heads)
    return not usual or spec.values == "keys" or spec.rotary_share != 1
