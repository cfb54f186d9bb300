"""Metadata of a GGUF file -> `GemmaConfig`, by the rules and with the defaults of llama.cpp.

The format leaves facts out that llama.cpp knows by the architecture's name: `load_hparams` of
`src/llama-model.cpp` and `load_arch_hparams` of `src/models/gemma{,2,3,3n}.cpp` (November 2026).
They are the constants of this file; `config_keys.py` says what becomes of every key.

Of Gemma 3n llama.cpp takes more from the name than it reads from the file: 20 layers with keys and
values of their own, 10 sparse ones. Its converter writes what the model has, and that is read here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

from gemma_jax.config import AltUpConfig, GemmaConfig, LayerSpec, PerLayerConfig, share_kv

from ..json_values import MAX_LAYERS
from .config_keys import HEAD_DIM, WIDTH, refuse_unknown_keys


@dataclass(frozen=True)
class _Family:
    """What the name of an architecture implies.

    Attributes:
      period: Layers of a period, of which the last is global, in files that do not say it.
      window: Of local layers, in files that do not say it; `None`: all layers are global then.
      local_theta: Base of their rope in files that do not say it; `None`: that of global layers,
        which they then share with its scaling.
      attn_cap, final_cap: Soft caps in files that do not say them.
      layers_of_27b: Number of layers of the size whose scores are scaled in another way.
      needs_window: Files without a window are broken.
    """

    period: int = 1
    window: int | None = None
    local_theta: float | None = None
    attn_cap: float | None = None
    final_cap: float | None = None
    layers_of_27b: int | None = None
    qk_norm: bool = False
    post_norms: bool = True
    needs_window: bool = False


FAMILIES = {
    "gemma": _Family(post_norms=False),
    "gemma2": _Family(period=2, window=4_096, attn_cap=50.0, final_cap=30.0, layers_of_27b=46),
    "gemma3": _Family(period=6, local_theta=10_000.0, layers_of_27b=62, qk_norm=True),
    "gemma3n": _Family(
        period=5, local_theta=10_000.0, final_cap=30.0, qk_norm=True, needs_window=True
    ),
}
THETA = 10_000.0
OWN_KV_LAYERS, SPARSE_LAYERS, SPARSITY = 20, 10, 0.95  # of Gemma 3n


def config_from_gguf(
    metadata: Mapping[str, object],
    vocab_size: int,
    *,
    laurel_rank: int | None = None,
    per_layer_rows: int | None = None,
) -> GemmaConfig:
    """The architecture of a file whose tensors have these sizes, which are not in its metadata.

    Whether the head is tied is not there either: the tensors say it.

    Args:
      vocab_size: Rows of the embedding.
      laurel_rank: Rows of Gemma 3n's LAuReL matrices.
      per_layer_rows: Rows of its table of per-layer embeddings; default: `vocab_size`.

    Raises:
      ValueError: another architecture, a key that is unknown, a missing or impossible value.
    """
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"general.architecture {name!r} is not supported; "
            f"expected one of: {', '.join(FAMILIES)}"
        )
    family, read = FAMILIES[name], Reader(metadata, f"{name}.")
    num_layers = read.whole("block_count")
    if num_layers > MAX_LAYERS:
        raise ValueError(f"{name}.block_count {num_layers} is beyond {MAX_LAYERS}")
    d_model = read.whole("embedding_length")
    num_heads = read.same_for_all("attention.head_count", num_layers)
    head_dim = read.whole("attention.key_length", d_model // num_heads)
    refuse_unknown_keys(metadata, name, {HEAD_DIM: head_dim, WIDTH: d_model})
    if read.whole("attention.value_length", d_model // num_heads) != head_dim:
        raise ValueError(f"{name}.attention.value_length differs from key_length {head_dim}")
    is_27b = num_layers == family.layers_of_27b  # GGUF does not store the scale
    cfg = GemmaConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_heads=num_heads,
        num_kv_heads=read.same_for_all("attention.head_count_kv", num_layers, num_heads),
        head_dim=head_dim,
        query_pre_attn_scalar=d_model // num_heads if is_27b else head_dim,
        layers=_layers(read, family, num_layers),
        max_positions=read.whole("context_length"),
        norm_eps=round(read.number("attention.layer_norm_rms_epsilon"), 12),  # stored as float32
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        attn_soft_cap=read.cap("attn_logit_softcapping", family.attn_cap),
        final_soft_cap=read.cap("final_logit_softcapping", family.final_cap),
    )
    if name != "gemma3n":
        return cfg
    return _with_gemma3n(cfg, read, laurel_rank, per_layer_rows or vocab_size)


def _with_gemma3n(
    cfg: GemmaConfig, read: "Reader", laurel_rank: int | None, per_layer_rows: int
) -> GemmaConfig:
    """The config with the parts that Gemma 3n alone has."""
    num_layers = len(cfg.layers)
    specs = [
        replace(spec, sparsity=sparsity)
        for spec, sparsity in zip(cfg.layers, read.sparsities(num_layers), strict=True)
    ]
    num_shared = read.whole(
        "attention.shared_kv_layers", max(0, num_layers - OWN_KV_LAYERS), least=0
    )
    return replace(
        cfg,
        query_pre_attn_scalar=1,
        layers=share_kv(specs, num_shared),
        optional_final_cap=True,
        origin="gemma3n_text",
        scale_plus_one=False,
        v_norm=True,
        laurel_rank=laurel_rank,
        per_layer=PerLayerConfig(
            width=read.whole("embedding_length_per_layer_input", 256),
            vocab_size=per_layer_rows,
        ),
        altup=AltUpConfig(
            num_streams=read.whole("altup.num_inputs", 4),
            active=read.whole("altup.active_idx", 0, least=0),
        ),
    )


def _layers(read: "Reader", family: _Family, num_layers: int) -> tuple[LayerSpec, ...]:
    theta, scale = read.number("rope.freq_base", THETA), read.rope_scale()
    widths = read.for_each("feed_forward_length", num_layers)
    own_rope = family.local_theta is not None  # then local layers are never scaled
    local_theta = read.number("rope.freq_base_swa", family.local_theta or theta)
    window = read.whole_or_none("attention.sliding_window", family.window)
    if window is None and family.needs_window:
        read.whole("attention.sliding_window")  # says what is wrong with it
    is_local = read.is_local(family.period, num_layers) if window else [False] * num_layers
    return tuple(
        LayerSpec(
            kind="local" if local else "global",
            window=window if local else None,
            rope_theta=local_theta if local else theta,
            rope_scale=1.0 if local and own_rope else scale,
            d_ff=d_ff,
        )
        for local, d_ff in zip(is_local, widths, strict=True)
    )


class Reader:
    """Typed access to the keys with one prefix, as a rule that of an architecture."""

    def __init__(self, metadata: Mapping[str, object], prefix: str):
        self.metadata, self.prefix = metadata, prefix

    def get(self, key: str, default: object = None) -> object:
        return self.metadata.get(self.prefix + key, default)

    def number(self, key: str, default: float | None = None) -> float:
        return self._number(key, self.get(key, default))

    def whole(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        value = self.get(key, default)
        if least == 0 and value == 0 and not isinstance(value, bool):
            return 0
        return self._whole(key, value)

    def whole_or_none(self, key: str, default: int | None) -> int | None:
        """0 says that there is none, and so do files without the key and a default."""
        return self._whole(key, value) if (value := self.get(key, default)) else None

    def for_each(self, key: str, num_layers: int, default: object = None) -> list[int]:
        """One number for all layers, or a list of them."""
        value = self.get(key, default)
        if not isinstance(value, list):
            return [self._whole(key, value)] * num_layers
        if len(value) != num_layers:
            raise ValueError(
                f"{self.prefix}{key} lists {len(value)} values for {num_layers} layers"
            )
        return [self._whole(key, one) for one in value]

    def same_for_all(self, key: str, num_layers: int, default: object = None) -> int:
        first, *others = self.for_each(key, num_layers, default)
        if set(others) - {first}:
            raise ValueError(f"{self.prefix}{key} differs from layer to layer; expected one value")
        return first

    def cap(self, key: str, default: float | None) -> float | None:
        """0 says that there is none."""
        return self.number(key, default) if self.get(key, default) else None

    def sparsities(self, num_layers: int) -> list[float]:
        """Of quantiles of the normal distribution; minus infinity says that none is cut off."""
        key = "activation_sparsity_scale"
        scales = self.get(key)
        if scales is None:
            return [SPARSITY if i < SPARSE_LAYERS else 0.0 for i in range(num_layers)]
        scales = scales if isinstance(scales, Sequence) else [scales] * num_layers
        if len(scales) != num_layers or not all(
            isinstance(scale, float) and scale < math.inf for scale in scales
        ):
            raise ValueError(f"{self.prefix}{key} must hold {num_layers} numbers below infinity")
        normal = NormalDist()
        # Stored as float32; it was made of a share with few digits.
        return [0.0 if one == -math.inf else round(normal.cdf(one), 6) for one in scales]

    def has(self, key: str) -> bool:
        return self.prefix + key in self.metadata

    def is_local(self, period: int, num_layers: int) -> list[bool]:
        """A switch for each layer, or a period whose last layer is global; a period of 0 has none
        (`load_swa_pattern`)."""
        key = "attention.sliding_window_pattern"
        value = self.get(key, period)
        if isinstance(value, list):
            if len(value) != num_layers or not all(one in (0, 1) for one in value):
                raise ValueError(
                    f"{self.prefix}{key} must hold 0 or 1 for each of {num_layers} layers"
                )
            return [bool(one) for one in value]
        period = self._whole(key, value) if value != 0 or isinstance(value, bool) else 0
        return [period == 0 or i % period < period - 1 for i in range(num_layers)]

    def rope_scale(self) -> float:
        """llama.cpp takes the kind for linear where a file does not say it, and 0 for no factor."""
        kind = self.get("rope.scaling.type", "linear")
        if kind not in ("none", "linear"):
            raise ValueError(f"{self.prefix}rope.scaling.type {kind!r} is not 'none' or 'linear'")
        key = "rope.scaling.factor" if self.has("rope.scaling.factor") else "rope.scale_linear"
        scale = self.number(key) if self.get(key, 0) != 0 else 1.0
        if kind == "none" and scale != 1:
            raise ValueError(f"{self.prefix}{key} is {scale}, but rope.scaling.type is 'none'")
        return scale

    def _number(self, key: str, value: object) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise ValueError(f"{self.prefix}{key} must be a positive number, got {value!r}")
        return value

    def _whole(self, key: str, value: object) -> int:
        if not isinstance(self._number(key, value), int):
            raise ValueError(f"{self.prefix}{key} must be a whole number, got {value!r}")
        return value  # pyright: ignore[reportReturnType]
