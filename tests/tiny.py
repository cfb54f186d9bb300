"""Tiny models with every feature of a family, for tests of properties rather than numbers."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_jax.config import (
    AltUpConfig,
    GemmaConfig,
    LayerSpec,
    ModalityVocabulary,
    PerLayerConfig,
    share_kv,
)
from gemma_jax.decoder.model import Block, Gemma, abstract_model
from gemma_jax.encoder_config import (
    AttentionBlock,
    AudioConfig,
    FusedBlock,
    InvertedBlock,
    MobileNetConfig,
    VisionConfig,
)
from gemma_jax.runtime import Runtime
from gemma_jax.weights.protocol import dense
from gemma_jax.weights.tree import map_params

WINDOW = 8


def gemma3(layers: int = 7, window: int = WINDOW, every: int = 3, **changes) -> GemmaConfig:
    """Local and global layers, grouped queries, QK-norm, scaled RoPE on the global layers.

    Each `every`th layer is global: `gemma3(2, every=2)` has one of each kind, and compiles fastest.
    """
    local = LayerSpec(kind="local", window=window, rope_theta=1e4, d_ff=48)
    wide = LayerSpec(kind="global", rope_theta=1e6, rope_scale=8.0, d_ff=48)
    fields = dict(
        vocab_size=96,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        query_pre_attn_scalar=12,
        layers=tuple(wide if (i + 1) % every == 0 else local for i in range(layers)),
        max_positions=512,
        qk_norm=True,
        post_norms=True,
    )
    return GemmaConfig(**(fields | changes))


def vision(**changes) -> VisionConfig:
    """4 x 4 patches, pooled to 2 x 2 soft tokens: `gemma3(vision=vision())` sees."""
    fields = dict(
        d_tower=24,
        d_ff=40,
        num_layers=2,
        num_heads=2,
        image_size=56,
        patch_size=14,
        num_soft_tokens=4,
        image_token=90,
        start_token=91,
        end_token=92,
    )
    return VisionConfig(**(fields | changes))


def gemma2() -> GemmaConfig:
    """Alternating layers, soft caps on scores and logits, no QK-norm."""
    pair = (LayerSpec(kind="local", window=WINDOW, d_ff=48), LayerSpec(kind="global", d_ff=48))
    return GemmaConfig(
        vocab_size=96,
        d_model=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        layers=pair * 2,
        max_positions=512,
        post_norms=True,
        attn_soft_cap=5.0,
        final_soft_cap=3.0,
    )


def gemma1() -> GemmaConfig:
    """Global layers alone, one key/value head, no post-norms."""
    return GemmaConfig(
        vocab_size=96,
        d_model=32,
        num_heads=4,
        num_kv_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        layers=(LayerSpec(kind="global", d_ff=48),) * 3,
        max_positions=512,
    )


def gemma3n(layers: int = 9, num_shared: int = 3) -> GemmaConfig:
    """Streams, low-rank residuals, per-layer inputs, sparse layers, shared keys and values."""
    specs = gemma3(layers).layers
    specs = [replace(s, rope_scale=1.0, sparsity=0.8 * (i < 3)) for i, s in enumerate(specs)]
    return replace(
        gemma3(),
        query_pre_attn_scalar=1,
        layers=share_kv(specs, num_shared),
        final_soft_cap=3.0,
        optional_final_cap=True,
        origin="gemma3n_text",
        scale_plus_one=False,
        v_norm=True,
        altup=AltUpConfig(num_streams=3),
        laurel_rank=4,
        per_layer=PerLayerConfig(width=8, vocab_size=90),
    )


def gemma4(**changes) -> GemmaConfig:
    """One layer of each kind and role. Global ones have wider heads, fewer keys, values from them.

    The published models have either these or per-layer embeddings and shared keys.
    """
    named = ("attention", "ffn", "per_layer", "layer_scale")
    local = LayerSpec(kind="local", window=WINDOW, d_ff=48, sub_blocks=named)
    wide = LayerSpec(
        kind="global", rope_theta=1e6, rotary_share=0.25, head_dim=32, num_kv_heads=1,
        values="keys", d_ff=48, sub_blocks=named,
    )  # fmt: skip
    specs = share_kv((local, wide) * 2, 2)
    fields = dict(
        layers=tuple(spec if spec.makes_keys else replace(spec, d_ff=96) for spec in specs),
        query_pre_attn_scalar=1,
        scale_plus_one=False,
        v_norm=True,
        per_layer=PerLayerConfig(width=8, vocab_size=96),
    )
    return replace(gemma3(), **(fields | changes))


def mobilenet(**changes) -> MobileNetConfig:
    """One block of each kind; images of 64 pixels become 2 x 2 soft tokens."""
    fields = dict(
        d_tower=20,
        d_stem=8,
        stages=(
            (FusedBlock(channels=8, stride=2),),
            (InvertedBlock(channels=8, start_kernel=3, middle_kernel=3, stride=2),),
            (AttentionBlock(channels=8, num_heads=2, head_dim=4, kv_stride=2),),
            (InvertedBlock(channels=12, start_kernel=5, stride=2, expansion=2),),
        ),
        image_size=64,
        num_soft_tokens=4,
        image_token=91,
        start_token=80,
        end_token=90,
    )
    return MobileNetConfig(**(fields | changes))


def audio(**changes) -> AudioConfig:
    """A conformer of two layers, a soft token for 16 frames of log-mel."""
    fields = dict(
        d_tower=24,
        num_layers=2,
        num_heads=2,
        num_mels=10,
        conv_channels=(6, 4),
        left_context=4,
        score_cap=5.0,
        clip=2.5,
        num_soft_tokens=6,
        audio_token=95,
        start_token=81,
        end_token=94,
    )
    return AudioConfig(**(fields | changes))


def vocabularies() -> tuple[ModalityVocabulary, ...]:
    """Ids 90 to 93 are of images, 94 to 97 of sounds; for `mobilenet()` and `audio()`."""
    return (
        ModalityVocabulary(first_id=90, vocab_size=4, width=20),
        ModalityVocabulary(first_id=94, vocab_size=4, width=24),
    )


def seeing_and_hearing(cfg: GemmaConfig, **changes) -> GemmaConfig:
    """The same with both towers of Gemma 3n: `seeing_and_hearing(gemma3n())`."""
    towers = dict(vision=mobilenet(), audio=audio(), modality_vocabularies=vocabularies())
    return replace(cfg, **({"vocab_size": 98} | towers | changes))


FAMILIES = {
    "gemma": gemma1,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma3n": lambda: gemma3n(6, 3),  # as few as have every kind of layer
    "gemma4": gemma4,
}


def model(cfg: GemmaConfig, layout="scan", seed: int = 0, block=Block, **runtime) -> Gemma:
    """Random weights, with norm scales away from their neutral values.

    NumPy makes them: compiling the initialisers would take most of the time of a small test.
    """
    random = np.random.default_rng(seed)

    def fill(param: nnx.Param) -> jax.Array:
        shape, inputs = param.get_value().shape, param.get_metadata().get("inputs", "")
        scale = math.prod(shape[len(shape) - len(inputs) :]) ** -0.5 if inputs else 0.3
        return jnp.asarray(scale * random.standard_normal(shape), jnp.float32)

    empty = abstract_model(cfg, runtime=Runtime(**runtime), layout=layout, block=block)
    return map_params(empty, fill)


def relayout(gemma: Gemma, layout: str) -> Gemma:
    """The same parameters in the other layout."""
    other = model(gemma.cfg, layout, block=gemma.make_block)
    other.runtime = gemma.runtime
    _restack(gemma, other)
    other.embed, other.final_norm = gemma.embed, gemma.final_norm
    other.per_layer, other.streams = gemma.per_layer, gemma.streams
    if gemma.vision is not None:
        old, new = gemma.vision.tower, other.vision.tower
        _restack(old, new)
        new.patches, new.final_norm = old.patches, old.final_norm
        other.vision.projector = gemma.vision.projector
    return other


def _restack(old, new) -> None:
    """Fills the blocks of `new` with those of `old`: decoders, or towers."""
    by_layer = {}
    for blocks, seg in zip(old.blocks, old.layer_groups):
        for position, block in enumerate(blocks):
            for repeat in range(seg.repeats):
                layer = jax.tree.map(lambda a, r=repeat: a[r], block)
                by_layer[seg.layer_index(position, repeat)] = layer
    for i, seg in enumerate(new.layer_groups):
        for position in range(len(seg.period)):
            rows = [by_layer[seg.layer_index(position, r)] for r in range(seg.repeats)]
            new.blocks[i][position] = jax.tree.map(lambda *a: jnp.stack(a), *rows)


def tokens(cfg: GemmaConfig, batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, cfg.vocab_size, (batch, length), np.int32)


def whole_groups(layout: str = "scan", **changes) -> Gemma:
    """A Gemma 3 whose inputs are whole groups of 32; F is four of them."""
    cfg = gemma3(**(dict(layers=3, d_model=64, head_dim=32, num_kv_heads=4) | changes))
    layers = tuple(replace(spec, d_ff=128) for spec in cfg.layers)
    return model(replace(cfg, layers=layers), layout)


def widened(model: Gemma) -> Gemma:
    """The model with an array in the place of every stand-in."""
    return map_params(model, lambda param: dense(param.get_value()))
