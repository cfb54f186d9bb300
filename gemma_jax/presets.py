"""Every released size, as data: the numbers of the technical reports and published configs.

And one tiny model of every generation.

Gemma 3's 4B, 12B and 27B see, all three through one tower: SigLIP So400m, 14-pixel patches, images
of 896 pixels (Gemma 3 report, section 2.1). Their vocabulary has 64 extra rows: the placeholder of
soft tokens, and padding.

Gemma 3n's E2B is a slice of its E4B: fewer layers, and half the feed-forward width. Both see and
hear, by MobileNetV5 and a USM conformer. Their vocabulary has 256 rows more than their per-layer
table, for images and audio.

Gemma 4's E2B and E4B are here as decoders of text (transformers 5.24, `configuration_gemma4.py`).
"""

from dataclasses import replace
from typing import Any

from gemma_jax.config import (
    AltUpConfig,
    GemmaConfig,
    LayerSpec,
    ModalityVocabulary,
    PerLayerConfig,
    share_kv,
)
from gemma_jax.encoder_config import AudioConfig, VisionConfig
from gemma_jax.mobilenet_presets import MOBILENET_V5_300M
from gemma_jax.text_embedding_config import TextEmbeddingConfig

SIGLIP = VisionConfig(
    d_tower=1_152,
    d_ff=4_304,
    num_layers=27,
    num_heads=16,
    image_size=896,
    patch_size=14,
    num_soft_tokens=256,
    image_token=262_144,
    start_token=255_999,
    end_token=256_000,
)
USM_CONFORMER = AudioConfig(
    d_tower=1_536,
    num_layers=12,
    num_heads=8,
    num_mels=128,
    audio_token=262_273,
    start_token=256_000,
    end_token=262_272,
)
LOCAL_THETA, GLOBAL_THETA = 10_000.0, 1_000_000.0
# What EmbeddingGemma was trained with, by task (`config_sentence_transformers.json`).
_SEARCH, _DOCUMENT = "task: search result | query: ", "title: none | text: "
_ALIKE, _CLASS = "task: sentence similarity | query: ", "task: classification | query: "
EMBEDDING_PROMPTS = (
    ("query", _SEARCH),
    ("document", _DOCUMENT),
    ("BitextMining", _SEARCH),
    ("Clustering", "task: clustering | query: "),
    ("Classification", _CLASS),
    ("InstructionRetrieval", "task: code retrieval | query: "),
    ("MultilabelClassification", _CLASS),
    ("PairClassification", _ALIKE),
    ("Reranking", _SEARCH),
    ("Retrieval", _SEARCH),
    ("Retrieval-query", _SEARCH),
    ("Retrieval-document", _DOCUMENT),
    ("STS", _ALIKE),
    ("Summarization", "task: summarization | query: "),
)


def _gemma1(layers: int, d_model: int, d_ff: int, heads: tuple[int, int]) -> GemmaConfig:
    return GemmaConfig(
        vocab_size=256_000,
        d_model=d_model,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=256,
        query_pre_attn_scalar=256,
        layers=(LayerSpec(kind="global", d_ff=d_ff),) * layers,
        max_positions=8_192,
    )


def _gemma2(
    layers: int, d_model: int, d_ff: int, heads: tuple[int, int], head_dim: int, scalar: float
) -> GemmaConfig:
    pair = (
        LayerSpec(kind="local", window=4_096, d_ff=d_ff),
        LayerSpec(kind="global", d_ff=d_ff),
    )
    return GemmaConfig(
        vocab_size=256_000,
        d_model=d_model,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        layers=pair * (layers // 2),
        max_positions=8_192,
        post_norms=True,
        attn_soft_cap=50.0,
        final_soft_cap=30.0,
    )


def _gemma3(
    layers: int,
    d_model: int,
    d_ff: int,
    heads: tuple[int, int],
    head_dim: int = 256,
    scalar: float = 256,
    *,
    vocab_size: int = 262_208,
    window: int = 1_024,
    max_positions: int = 131_072,
    rope_scale: float = 8.0,
    vision: VisionConfig | None = SIGLIP,
) -> GemmaConfig:
    local = LayerSpec(kind="local", window=window, rope_theta=LOCAL_THETA, d_ff=d_ff)
    wide = LayerSpec(kind="global", rope_theta=GLOBAL_THETA, rope_scale=rope_scale, d_ff=d_ff)
    return GemmaConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        layers=tuple(wide if (i + 1) % 6 == 0 else local for i in range(layers)),
        max_positions=max_positions,
        qk_norm=True,
        post_norms=True,
        vision=vision,
    )


def _gemma3n(layers: int, d_ff: int, num_shared: int, *, num_sparse: int = 10) -> GemmaConfig:
    def spec(i: int) -> LayerSpec:
        wide = (i + 1) % 5 == 0
        return LayerSpec(
            kind="global" if wide else "local",
            window=None if wide else 512,
            rope_theta=GLOBAL_THETA if wide else LOCAL_THETA,
            d_ff=d_ff,
            sparsity=0.95 if i < num_sparse else 0.0,
        )

    return GemmaConfig(
        vocab_size=262_400,
        d_model=2_048,
        num_heads=8,
        num_kv_heads=2,
        head_dim=256,
        query_pre_attn_scalar=1,
        layers=share_kv([spec(i) for i in range(layers)], num_shared),
        max_positions=32_768,
        qk_norm=True,
        post_norms=True,
        final_soft_cap=30.0,
        optional_final_cap=True,
        origin="gemma3n_text",
        scale_plus_one=False,
        v_norm=True,
        altup=AltUpConfig(),
        laurel_rank=64,
        per_layer=PerLayerConfig(width=256, vocab_size=262_144),
        modality_vocabularies=(
            ModalityVocabulary(first_id=262_144, vocab_size=128, width=MOBILENET_V5_300M.d_tower),
            ModalityVocabulary(first_id=262_272, vocab_size=128, width=USM_CONFORMER.d_tower),
        ),
        vision=MOBILENET_V5_300M,
        audio=USM_CONFORMER,
    )


def _gemma4(
    layers: int,
    d_model: int,
    d_ff: int,
    num_kv_heads: int,
    num_shared: int,
    *,
    period: int,
    wider: int = 1,
) -> GemmaConfig:
    """A decoder of Gemma 4.

    Args:
      period: One of so many layers is global.
      wider: Feed-forwards of layers that share keys and values are so many times as wide.
    """

    def spec(i: int) -> LayerSpec:
        wide = (i + 1) % period == 0
        return LayerSpec(
            kind="global" if wide else "local",
            window=None if wide else 512,
            rope_theta=GLOBAL_THETA if wide else LOCAL_THETA,
            d_ff=d_ff,
            head_dim=512 if wide else None,
            rotary_share=0.25 if wide else 1.0,
            sub_blocks=("attention", "ffn", "per_layer", "layer_scale"),
        )

    specs = share_kv([spec(i) for i in range(layers)], num_shared)
    return GemmaConfig(
        vocab_size=262_144,
        d_model=d_model,
        num_heads=8,
        num_kv_heads=num_kv_heads,
        head_dim=256,
        query_pre_attn_scalar=1,
        layers=tuple(s if s.makes_keys else replace(s, d_ff=wider * d_ff) for s in specs),
        max_positions=131_072,
        qk_norm=True,
        post_norms=True,
        final_soft_cap=30.0,
        origin="gemma4_text",
        scale_plus_one=False,
        v_norm=True,
        per_layer=PerLayerConfig(width=256, vocab_size=262_144),
    )


def _embedding_gemma() -> GemmaConfig:
    """A Gemma 3 that reads both ways.

    Its window of 512 tokens lies half on either side: 256, and the token itself (transformers 5.24,
    `configuration_gemma3.py`).
    """
    cfg = _gemma3(24, 768, 1_152, (3, 1), **_SMALL | {"window": 257, "max_positions": 2_048})
    head = TextEmbeddingConfig(dense=(3_072, 768), max_tokens=2_048, prompts=EMBEDDING_PROMPTS)
    return replace(cfg, bidirectional=True, text_embedding=head)


_SMALL: dict[str, Any] = dict(
    vocab_size=262_144, window=512, max_positions=32_768, rope_scale=1.0, vision=None
)

PRESETS: dict[str, GemmaConfig] = {
    "gemma-2b": _gemma1(18, 2_048, 16_384, (8, 1)),
    "gemma-7b": _gemma1(28, 3_072, 24_576, (16, 16)),
    "gemma2-2b": _gemma2(26, 2_304, 9_216, (8, 4), 256, 256),
    "gemma2-9b": _gemma2(42, 3_584, 14_336, (16, 8), 256, 256),
    "gemma2-27b": _gemma2(46, 4_608, 36_864, (32, 16), 128, 144),
    "gemma3-270m": _gemma3(18, 640, 2_048, (4, 1), **_SMALL),
    "gemma3-1b": _gemma3(26, 1_152, 6_912, (4, 1), **_SMALL),
    "gemma3-4b": _gemma3(34, 2_560, 10_240, (8, 4)),
    "gemma3-12b": _gemma3(48, 3_840, 15_360, (16, 8)),
    "gemma3-27b": _gemma3(62, 5_376, 21_504, (32, 16), 128, 168),
    "embeddinggemma-300m": _embedding_gemma(),
    "gemma3n-e2b": _gemma3n(30, 8_192, 10),
    "gemma3n-e4b": _gemma3n(35, 16_384, 15),
    "gemma4-e2b": _gemma4(35, 1_536, 6_144, 1, 20, period=5, wider=2),
    "gemma4-e4b": _gemma4(42, 2_560, 10_240, 2, 18, period=6),
}


def _tiny(cfg: GemmaConfig, **changes: Any) -> GemmaConfig:
    """The same architecture in miniature, for the vocabulary of checkpoints/elastic."""
    layers = tuple(
        replace(spec, window=spec.window and 64, head_dim=spec.head_dim and 32)
        for spec in cfg.layers
    )
    sizes = dict(vocab_size=1_024, d_model=64, num_heads=4, head_dim=16, max_positions=1_024)
    return replace(cfg, layers=layers, **sizes, **changes)


# For tests and teaching: under a million parameters each, with all that the generation has.
TINY: dict[str, GemmaConfig] = {
    "tiny-gemma": _tiny(_gemma1(4, 64, 256, (4, 1)), query_pre_attn_scalar=16),
    "tiny-gemma2": _tiny(_gemma2(4, 64, 256, (4, 2), 16, 16)),
    "tiny-gemma3": _tiny(_gemma3(6, 64, 256, (4, 2), 16, 16, vision=None)),
    "tiny-embeddinggemma": _tiny(
        _gemma3(6, 64, 256, (4, 2), 16, 16, **_SMALL),
        bidirectional=True,
        text_embedding=TextEmbeddingConfig(
            dense=(128, 64), max_tokens=1_024, prompts=EMBEDDING_PROMPTS
        ),
    ),
    "tiny-gemma3n": _tiny(
        _gemma3n(15, 128, 5, num_sparse=5),
        modality_vocabularies=(),
        vision=None,
        audio=None,
        laurel_rank=8,
        per_layer=PerLayerConfig(width=16, vocab_size=1_000),
    ),
    "tiny-gemma4": _tiny(
        _gemma4(15, 64, 96, 2, 5, period=5, wider=2),
        per_layer=PerLayerConfig(width=16, vocab_size=1_024),
    ),
}


def preset(name: str) -> GemmaConfig:
    """Returns the config of a released size, or of a tiny model (`"tiny-gemma3"`) to try ideas on.

    Raises:
      ValueError: An unknown name; says all of them.

    Examples:
      >>> import gemma_jax as gj
      >>> cfg = gj.preset("gemma3-4b")
      >>> len(cfg.layers), cfg.d_model, [spec.kind for spec in cfg.layers].count("global")
      (34, 2560, 5)
      >>> tiny = gj.preset("tiny-gemma3")
      >>> len(tiny.layers), tiny.d_model, [spec.kind for spec in tiny.layers].count("global")
      (6, 64, 1)
    """
    known = PRESETS | TINY
    if name not in known:
        raise ValueError(f"unknown preset {name!r}; choose one of: {', '.join(known)}")
    return known[name]
