"""Metadata of a GGUF file -> `GemmaConfig`.

The format leaves facts out that llama.cpp knows by the architecture's name (`src/llama-model.cpp`,
`load_hparams` of `LLM_ARCH_GEMMA{,2,3}`). They are the constants of this file.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_jax.config import GemmaConfig, LayerSpec

from ..json_values import MAX_LAYERS


@dataclass(frozen=True)
class _Family:
    """What the name of an architecture implies.

    Attributes:
      pattern: Layers of a period, of which the last is global.
      defaults: Of keys that older files lack.
    """

    pattern: int
    defaults: Mapping[str, float | None]
    qk_norm: bool = False
    post_norms: bool = True


LOCAL_THETA = 10_000.0
FAMILIES = {
    "gemma": _Family(1, {"rope.freq_base": 10_000.0}, post_norms=False),
    "gemma2": _Family(
        2,
        {
            "rope.freq_base": 10_000.0,
            "attention.sliding_window": 4_096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3": _Family(
        6, {"rope.freq_base": 1_000_000.0, "final_logit_softcapping": None}, qk_norm=True
    ),
}


def config_from_gguf(metadata: Mapping[str, object], vocab_size: int) -> GemmaConfig:
    """The architecture of a file whose embedding has `vocab_size` rows.

    Raises:
      ValueError: another architecture, a missing or impossible value, an unknown rope scaling.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"general.architecture {name!r} is not supported; "
            f"expected one of: {', '.join(FAMILIES)}"
        )
    family, read = FAMILIES[name], _Reader(metadata, f"{name}.", FAMILIES[name].defaults)
    num_layers, num_heads = read.whole("block_count"), read.whole("attention.head_count")
    if num_layers > MAX_LAYERS:
        raise ValueError(f"{name}.block_count {num_layers} is beyond {MAX_LAYERS}")
    d_model, head_dim = read.whole("embedding_length"), read.whole("attention.key_length")
    if read.whole("attention.value_length") != head_dim:
        raise ValueError(f"{name}.attention.value_length differs from key_length {head_dim}")
    return GemmaConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=read.whole("attention.head_count_kv"),
        head_dim=head_dim,
        query_pre_attn_scalar=_query_scalar(d_model, num_heads, head_dim),
        layers=_layers(read, family, num_layers),
        max_positions=read.whole("context_length"),
        norm_eps=round(read.number("attention.layer_norm_rms_epsilon"), 12),  # stored as float32
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        attn_soft_cap=read.cap("attn_logit_softcapping"),
        final_soft_cap=read.cap("final_logit_softcapping"),
    )


def _query_scalar(d_model: int, num_heads: int, head_dim: int) -> float:
    """GGUF does not store it. The two released sizes with heads of 128, Gemma 2 and 3 27B, scale
    by `d_model / num_heads` (144, 168), all others by the head dimension. llama.cpp goes by the
    number of layers (`LLM_TYPE_27B`), which says the same."""
    return d_model / num_heads if head_dim == 128 else head_dim


def _layers(read: "_Reader", family: _Family, num_layers: int) -> tuple[LayerSpec, ...]:
    theta, scale = read.number("rope.freq_base"), read.rope_scale()
    d_ff, local_rope = read.whole("feed_forward_length"), (theta, scale)
    if family.qk_norm:  # Gemma 3: local layers have their own base, and are never scaled
        local_rope = (LOCAL_THETA, 1.0)
    wide = LayerSpec(kind="global", rope_theta=theta, rope_scale=scale, d_ff=d_ff)
    if family.pattern == 1:
        return (wide,) * num_layers
    local = LayerSpec(
        kind="local",
        window=read.whole("attention.sliding_window"),
        rope_theta=local_rope[0],
        rope_scale=local_rope[1],
        d_ff=d_ff,
    )
    return tuple(local if (i + 1) % family.pattern else wide for i in range(num_layers))


class _Reader:
    """Typed access to the keys of one architecture."""

    def __init__(self, metadata: Mapping[str, object], prefix: str, defaults: Mapping):
        self.metadata, self.prefix, self.defaults = metadata, prefix, defaults

    def number(self, key: str) -> float:
        value = self.metadata.get(self.prefix + key, self.defaults.get(key))
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise ValueError(f"{self.prefix}{key} must be a positive number, got {value!r}")
        return value

    def whole(self, key: str) -> int:
        value = self.number(key)
        if not isinstance(value, int):
            raise ValueError(f"{self.prefix}{key} must be a whole number, got {value!r}")
        return value

    def cap(self, key: str) -> float | None:
        stored = self.metadata.get(self.prefix + key, self.defaults.get(key))
        return self.number(key) if stored else None

    def rope_scale(self) -> float:
        kind = self.metadata.get(self.prefix + "rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise ValueError(f"{self.prefix}rope.scaling.type {kind!r} is not 'none' or 'linear'")
        return self.number("rope.scaling.factor") if kind == "linear" else 1.0
