"""One pass over new tokens: training, scoring, prefill and decoding alike."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from gemma_jax.decoder.cache import Cache, plan_slots
from gemma_jax.decoder.context import make_context
from gemma_jax.decoder.model import Gemma, LayerInputs
from gemma_jax.decoder.soft_tokens import SoftTokens
from gemma_jax.nn.layer_stack import run_layers

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
    x, layers, taps = run_layers(model.blocks, model.layer_groups, x, ctx, layers, inputs)
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
