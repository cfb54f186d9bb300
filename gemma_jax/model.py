"""The decoder: blocks, the stack of them, and one forward pass.

x = embed(tokens) * sqrt(D), or soft tokens in the place of images
for each layer:  x = x + post_norm(attention(pre_norm(x)))
                 x = x + post_norm(ffn(pre_norm(x)))
logits = embed.T(final_norm(x))

Gemma 3n puts this into the middle of several streams: a layer predicts them all, computes one, and
corrects them all by its result.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.cache import Cache, LayerCache, plan_slots
from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.context import Context, Runtime, make_context
from gemma_jax.nn.altup import AltUp, Streams
from gemma_jax.nn.attention import Attention
from gemma_jax.nn.embed import Embedder, ModalityEmbedder
from gemma_jax.nn.ffn import FeedForward
from gemma_jax.nn.laurel import Laurel
from gemma_jax.nn.norm import RMSNorm
from gemma_jax.nn.per_layer import PerLayerEmbedder, PerLayerInput
from gemma_jax.segments import Layout, segment_layers
from gemma_jax.stack import LayerOutput, run_layers, stack_layers
from gemma_jax.vision.encoder import VisionEncoder
from gemma_jax.vision.soft_tokens import SoftTokens

CAPTURES = (
    "embeddings",
    "per_layer_inputs",
    "layer_outputs",
    "attention_weights",
    "final_norm",
    "laurel",
    "altup_predictions",
    "altup_mixtures",
    "altup_gains",
    "per_layer_gates",
    "sparsity_masks",
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerInputs:
    """What one layer gets besides the stream; stacked along a leading L for all of them.

    Attributes:
      vector_BTP: Its part of the per-layer inputs, in models that have them.
      width: Feed-forward channels to compute with; `None` for all.
    """

    vector_BTP: jax.Array | None = None
    width: jax.Array | None = None


class Block(nnx.Module):
    """One decoder layer: attention and feed-forward, each between norms, on a residual stream.

    With AltUp, LAuReL and per-layer inputs as far as the config has them (hf
    `Gemma3nTextDecoderLayer`).
    """

    def __init__(self, cfg: GemmaConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        def norm():
            return RMSNorm("D", cfg.d_model, cfg.norm_eps, plus_one=cfg.scale_plus_one)

        self.spec = spec
        self.altup = AltUp(cfg, rngs=rngs) if cfg.altup else None
        self.laurel = Laurel(cfg, rngs=rngs) if cfg.laurel_rank else None
        self.per_layer = PerLayerInput(cfg, rngs=rngs) if cfg.per_layer else None
        self.pre_attn_norm = norm()
        self.attn = Attention(cfg, spec, rngs=rngs)
        self.post_attn_norm = norm() if cfg.post_norms else None
        self.pre_ffn_norm = norm()
        self.ffn = FeedForward(cfg, spec, rngs=rngs)
        self.post_ffn_norm = norm() if cfg.post_norms else None

    def __call__(
        self,
        x: jax.Array,
        ctx: Context,
        cache: LayerCache | None,
        inputs: LayerInputs = LayerInputs(),
    ) -> LayerOutput:
        """The stream `[B, T, D]`, or streams `[A, B, T, D]`, after this layer."""
        numerics, extra = ctx.runtime.numerics, {}
        if self.altup is not None:
            with jax.named_scope("altup"):
                x, extra["altup_mixtures"] = self.altup.predict(x, numerics)
                extra["altup_predictions"] = x
        y_BTD, cache, kv, taps = self._compute(
            x if self.altup is None else x[self.altup.active], ctx, cache, inputs.width
        )
        if self.altup is None:
            x = active_BTD = y_BTD
        else:
            with jax.named_scope("altup"):
                x, extra["altup_gains"] = self.altup.correct(x, y_BTD, numerics)
                active_BTD = self.altup.scaled(x)
        if self.per_layer is not None:
            with jax.named_scope("per_layer"):
                y_BTD, gates = self.per_layer(active_BTD, inputs.vector_BTP, numerics)
                extra |= gates
                # The first stream is left alone, whichever one is active.
                x = x + y_BTD if self.altup is None else x.at[1:].add(y_BTD)
        lent = {self.spec.kind: kv} if self.spec.kv == "lent" else {}
        taps = taps | extra | {"layer_outputs": x}
        return LayerOutput(x=x, cache=cache, taps=taps, lent=lent)

    def _compute(
        self,
        x_BTD: jax.Array,
        ctx: Context,
        cache: LayerCache | None,
        width: jax.Array | None,
    ):
        """Attention, with LAuReL beside it, and feed-forward, on one stream."""
        numerics = ctx.runtime.numerics
        normed_BTD = self.pre_attn_norm(x_BTD, numerics)
        with jax.named_scope("attention"):
            y_BTD, cache, kv, taps = self.attn(normed_BTD, ctx, cache)
            x_BTD += y_BTD if self.post_attn_norm is None else self.post_attn_norm(y_BTD, numerics)
        if self.laurel is not None:
            with jax.named_scope("laurel"):
                taps["laurel"] = self.laurel(normed_BTD, numerics)
                x_BTD = (x_BTD + taps["laurel"]) / math.sqrt(2)
        with jax.named_scope("ffn"):
            y_BTD, masks = self.ffn(self.pre_ffn_norm(x_BTD, numerics), width)
            x_BTD += y_BTD if self.post_ffn_norm is None else self.post_ffn_norm(y_BTD, numerics)
        return x_BTD, cache, kv, taps | masks


class Gemma(nnx.Module):
    """Parameters of a model. Stateless: caches are passed to `forward` and come back from it."""

    def __init__(
        self,
        cfg: GemmaConfig,
        *,
        rngs: nnx.Rngs,
        runtime: Runtime = Runtime(),
        layout: Layout = "scan",
    ):
        self.cfg, self.runtime = cfg, runtime
        self.segments = segment_layers(cfg.layers, layout)
        self.embed = Embedder(cfg, rngs=rngs)
        self.modalities = nnx.List(
            [ModalityEmbedder(cfg, ids, rngs=rngs) for ids in cfg.modality_vocabularies]
        )
        self.blocks = stack_layers(lambda spec, r: Block(cfg, spec, rngs=r), self.segments, rngs)
        self.per_layer = PerLayerEmbedder(cfg, rngs=rngs) if cfg.per_layer else None
        self.streams = Streams(cfg, rngs=rngs) if cfg.altup else None
        self.final_norm = RMSNorm("D", cfg.d_model, cfg.norm_eps, plus_one=cfg.scale_plus_one)
        self.vision = VisionEncoder(cfg, rngs=rngs, layout=layout) if cfg.vision else None

    @property
    def soft_cap(self) -> float | None:
        """Cap on the logits, under the numerics in use."""
        if self.cfg.altup is not None and not self.runtime.numerics.cap_gemma3n:
            return None
        return self.cfg.final_soft_cap


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """Result of `forward`.

    Attributes:
      logits: float32 `[B, T, V]`, `[B, 1, V]` for `logits="last"`, `None` for `"none"`.
      cache: The cache with the new tokens in it; `None` if none was given.
      captured: name -> array; per-layer results are stacked to `[L, ...]`, or a tuple of L arrays
        where the layers' shapes differ.
    """

    logits: jax.Array | None
    cache: Cache | None
    captured: dict[str, jax.Array | tuple[jax.Array, ...]]


@partial(jax.jit, static_argnames=("logits", "capture"))
def forward(
    model: Gemma,
    tokens_BT: jax.Array,
    positions_BT: jax.Array | None = None,
    *,
    soft: SoftTokens | None = None,
    cache: Cache | None = None,
    rope_positions_BT: jax.Array | None = None,
    logits: Literal["all", "last", "none"] = "all",
    capture: tuple[str, ...] = (),
    ffn_widths_L: jax.Array | None = None,
) -> Output:
    """One pass over `T` new tokens per row: training, scoring, prefill and decoding alike.

    Compiled once per shape; inside another `jax.jit`, `grad` or `vmap` it is part of that program.

    Args:
      model: Parameters, and the `Runtime` to compute with.
      tokens_BT: int32 ids in `[0, V)`; the placeholders of soft tokens may lie beyond.
      positions_BT: int32, ascending along each row, -1 for padding on either side. Masks are made
        from them. Default: every token is real and follows on what the cache holds.
      soft: Images in the place of some tokens, from `soft_tokens`. A pass holds an image whole.
      cache: Keys and values of earlier tokens, from `init_cache` or an earlier pass.
      rope_positions_BT: Positions for the rotary embedding if they are not `positions_BT`.
      logits: For every token, for the last real one of each row, or for none.
      capture: Names out of `CAPTURES`. `attention_weights` are dense `[B, N, T, S]`;
        `sparsity_masks` come from the sparse layers alone.
      ffn_widths_L: Feed-forward channels per layer, int32: computes as a MatFormer slice of these
        widths would, with one program for all widths. It saves no work (`matformer.at` does), and
        is for training and for searching slices.
    """
    if unknown := set(capture) - set(CAPTURES):
        raise ValueError(f"cannot capture {sorted(unknown)}; choose from {', '.join(CAPTURES)}")
    whole = positions_BT is None and cache is None and soft is None
    if positions_BT is None:
        start_B = jnp.zeros(len(tokens_BT), jnp.int32) if cache is None else cache.length_B
        positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    if rope_positions_BT is None:
        rope_positions_BT = positions_BT
    slots, positions = plan_slots(cache, positions_BT) if cache is not None else ({}, {})
    ctx = make_context(
        model.cfg,
        model.runtime,
        positions_BT,
        rope_positions_BT,
        None if soft is None else soft.block_BT,
        whole,
        slots,
        frozenset(capture),
    )

    x_BTD = ctx.place(model.embed.encode(tokens_BT, model.runtime.dtype))
    captured = {"embeddings": x_BTD}
    for modality in model.modalities:
        x_BTD = modality.insert(tokens_BT, x_BTD, model.runtime.numerics)
    if soft is not None:
        x_BTD = soft.insert(x_BTD)
    inputs = LayerInputs(width=ffn_widths_L)
    if model.per_layer is not None:
        per_layer_BTLP = model.per_layer(tokens_BT, x_BTD, model.runtime.numerics)
        captured["per_layer_inputs"] = per_layer_BTLP
        inputs = replace(inputs, vector_BTP=jnp.moveaxis(per_layer_BTLP, 2, 0))
    x = x_BTD if model.streams is None else model.streams.spread(x_BTD)
    layers = cache.layers if cache is not None else None
    x, layers, taps = run_layers(model.blocks, model.segments, x, ctx, layers, inputs)
    x_BTD = x if model.streams is None else model.streams.merge(x)
    x_BTD = model.final_norm(x_BTD, model.runtime.numerics)
    captured |= taps | {"final_norm": x_BTD}
    if absent := [name for name in capture if name not in captured]:
        raise ValueError(f"this model has no part to capture {', '.join(absent)} from")
    return Output(
        logits=_head(model, x_BTD, positions_BT, logits),
        cache=None if cache is None else replace(cache, layers=layers, positions=positions),
        captured={name: captured[name] for name in capture},
    )


def _head(model: Gemma, x_BTD: jax.Array, pos_BT: jax.Array, which: str) -> jax.Array | None:
    if which == "none":
        return None
    if which == "last":
        last_B1 = jnp.argmax(pos_BT, axis=1, keepdims=True)
        x_BTD = jnp.take_along_axis(x_BTD, last_B1[:, :, None], axis=1)
    elif which != "all":
        raise ValueError(f"logits={which!r} must be 'all', 'last' or 'none'")
    with jax.named_scope("head"):
        logits_BTV = model.embed.decode(x_BTD).astype(jnp.float32)
        if (cap := model.soft_cap) is not None:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
    return logits_BTV
