"""One pass over new tokens: training, scoring, prefill and decoding alike."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import Cache, plan_slots
from gemma_jax.decoder.context import make_context, tokens_at
from gemma_jax.decoder.model import Gemma, LayerInputs
from gemma_jax.decoder.patching import (
    DIMS,
    PLAIN_ATTENTION,
    Patch,
    Patches,
    patched_layers,
    read_patch,
)
from gemma_jax.decoder.skipping import may_skip, run_wanted
from gemma_jax.nn.layer_stack import run_layers
from gemma_jax.weights.float16 import with_float16_products

CAPTURES = tuple(DIMS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """Holds what `forward` returns: logits, the cache and what was captured.

    Attributes:
      logits: float32 `[B, T, V]`, `[B, 1, V]` for `logits="last"`, `None` for `"none"`.
      cache: The cache with the new tokens in it; `None` if none was given.
      captured: name -> array; per-layer results are stacked to `[L, ...]`, or a tuple of L arrays
        where the layers' shapes differ.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model, tok = gj.load("checkpoints/digits")
      >>> out = gj.forward(model, np.array([[2, 5, 7]]), logits="last", capture=("layer_outputs",))
      >>> out.logits.shape, out.captured["layer_outputs"].shape
      ((1, 1, 359), (3, 1, 3, 64))
    """

    logits: jax.Array | None
    cache: Cache | None
    captured: dict[str, jax.Array | tuple[jax.Array, ...]]


def forward(
    model: Gemma,
    batch: Batch | jax.typing.ArrayLike | Sequence[Sequence[int]],
    *,
    cache: Cache | None = None,
    logits: Literal["all", "last", "none"] = "all",
    capture: str | Sequence[str] = (),
    patch: Patch | None = None,
) -> Output:
    """Runs a model over `T` new tokens per row: for training, scoring, prefill and decoding alike.

    Compiled once per shape; inside another `jax.jit`, `grad` or `vmap` it is part of that program.

    Args:
      model: Parameters, and the `Runtime` to compute with.
      batch: A `Batch`, or int32 token ids `[B, T]` of plain text, as an array or as lists.
      cache: Keys and values of earlier tokens, from `init_cache` or an earlier pass.
      logits: For every token, for the last real one of each row, or for none. Where few are wanted,
        the last layers compute what these need alone (see `gemma_jax.decoder.skipping`).
      capture: One name out of `CAPTURES`, or several. `embeddings` are those of the token ids,
        `inputs_embeds` what enters the layers, soft tokens in their places. `attention_weights` are
        dense `[B, N, T, S]`; `sparsity_masks` come from the sparse layers alone.
        `attention_outputs`, `ffn_outputs` and `per_layer_outputs` are what these parts of a layer
        add to the stream, `layer_outputs` the stream after it: `[B, T, D]`, in Gemma 3n
        `[A, B, T, D]`.
      patch: Other values in the place of intermediate results, by the names of `capture`; all that
        is computed afterwards reads them. `{name: (layer, position, value)}` reads as
        `captured[name][layer][..., position, :] = value`: numbers, slices or integers in an array
        for layers and for positions among the T tokens (not for `embeddings`, `inputs_embeds` and
        `final_norm`, whose layer is `None`), and a value that NumPy could assign there: `[D]`,
        `[B, D]`, and in Gemma 3n for all streams or `[A, B, D]`. `{name: function}` goes on with
        `function(layer, value)`, for every layer, whose number is a traced int32; a new function
        is a new program, the leaves of a `jax.tree_util.Partial` are not. A list holds several. In
        a compiled function, layers, positions and values may be traced, and have gradients.

    Raises:
      ValueError: Tokens that are not `[B, T]`, names that cannot be captured or patched, layers,
        positions or values that do not fit, other `logits`, widths that the model does not have, a
        text longer than its context, or packed documents together with a cache. Ids outside the
        vocabulary are refused in lists and NumPy arrays of plain text. On a device they are not
        looked at, which would mean to wait for it: there, ids beyond the vocabulary read row 0.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model, tok = gj.load("checkpoints/digits")
      >>> ids = tok.encode("Which digit is left?", bos=True)
      >>> gj.forward(model, np.array([ids])).logits.shape
      (1, 6, 359)
      >>> patch = {"layer_outputs": (1, -1, np.zeros(64))}  # the last token after layer 1
      >>> gj.forward(model, np.array([ids]), patch=patch).logits.shape
      (1, 6, 359)
    """
    capture = (capture,) if isinstance(capture, str) else tuple(capture)
    if unknown := set(capture) - set(CAPTURES):
        raise ValueError(f"cannot capture {sorted(unknown)}; choose from {', '.join(CAPTURES)}")
    if logits not in ("all", "last", "none"):
        raise ValueError(f"logits={logits!r} must be 'all', 'last' or 'none'")
    batch = Batch.of(batch)
    batch.check(model.cfg)
    patches = read_patch(patch, len(model.cfg.layers), batch.tokens_BT.shape[1])
    if "attention_weights" in patches and model.runtime.attention_impl not in PLAIN_ATTENTION:
        raise ValueError(
            f"attention_impl={model.runtime.attention_impl!r} has no attention_weights to patch; "
            f"take one of {', '.join(PLAIN_ATTENTION)}"
        )
    return _forward(model, batch, cache=cache, logits=logits, capture=capture, patch=patches)


@partial(jax.jit, static_argnames=("logits", "capture"))
def _forward(
    model: Gemma,
    batch: Batch,
    *,
    cache: Cache | None,
    logits: str,
    capture: tuple[str, ...],
    patch: Patches,
) -> Output:
    if model.runtime.numerics.float16_matrices:
        model = with_float16_products(model)
    tokens_BT = batch.tokens_BT
    positions_BT = batch.positions_BT
    if positions_BT is None:
        start_B = jnp.zeros(len(tokens_BT), jnp.int32) if cache is None else cache.length_B
        positions_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    if cache is not None:
        model.cfg.require_causal("has no cache")
    slots, positions = plan_slots(cache, positions_BT) if cache is not None else ({}, {})
    ctx = make_context(
        model.cfg,
        model.runtime,
        replace(batch, positions_BT=positions_BT),
        static_mask=cache is None
        and not model.cfg.bidirectional
        and all(x is None for x in (batch.positions_BT, batch.documents_BT, batch.soft)),
        slots=slots,
        capture=frozenset((*capture, *patch)),
        patch=patch,
    )

    captured: dict[str, jax.Array | tuple[jax.Array, ...]] = {}
    note = partial(ctx.note, captured)
    x_BTD = note("embeddings", ctx.place(model.embed.encode(tokens_BT, model.runtime.dtype)))
    for embedder in model.modality_embedders:
        x_BTD = embedder.insert(tokens_BT, x_BTD, model.runtime.numerics)
    if batch.soft is not None:
        x_BTD = batch.soft.insert(x_BTD)
    x_BTD = note("inputs_embeds", x_BTD)
    numbers = jnp.arange(len(model.cfg.layers), dtype=jnp.int32) if patch else None
    inputs = LayerInputs(width=batch.ffn_widths_L, layer=numbers)
    if model.per_layer is not None:
        per_layer_BTLP = model.per_layer(tokens_BT, x_BTD, model.runtime.numerics)
        if changes := patch.get("per_layer_inputs"):
            per_layer_BTLP = patched_layers(changes, "per_layer_inputs", per_layer_BTLP, axis=2)
        captured["per_layer_inputs"] = per_layer_BTLP
        inputs = replace(inputs, vector_BTP=jnp.moveaxis(per_layer_BTLP, 2, 0))
    x = x_BTD if model.streams is None else model.streams.spread(x_BTD)
    last_B1 = jnp.argmax(positions_BT, axis=1, keepdims=True) if logits == "last" else None
    layers = cache.layers if cache is not None else None
    if may_skip(model, tokens_BT.shape[1], logits, (*capture, *patch)):
        out = run_wanted(model, x, ctx, layers, inputs, last_B1)
    else:
        out = run_layers(model.blocks, model.layer_groups, x, ctx, layers, inputs)
    x_BTD = _merge(model, out.x)
    x_BTD = note("final_norm", model.final_norm(x_BTD, model.runtime.numerics))
    captured |= out.captured
    for names, what in ((capture, "to capture {} from"), (patch, "whose {} could be patched")):
        if absent := [name for name in names if name not in captured]:
            raise ValueError(f"this model has no part {what.format(', '.join(absent))}")
    return Output(
        logits=None if logits == "none" else _head(model, x_BTD, last_B1),
        cache=None if cache is None else replace(cache, layers=out.cache, positions=positions),
        captured={name: captured[name] for name in capture},
    )


# As of any compiled function: `forward.lower(model, ids).compile()`.
_compiled = jax.jit(forward, static_argnames=("logits", "capture"))
for name, method in {
    "trace": _compiled.trace,
    "lower": _compiled.lower,
    "eval_shape": _compiled.eval_shape,
    "_cache_size": _forward._cache_size,  # tests count the programs
}.items():
    setattr(forward, name, method)


@jax.jit
def unembed(model: Gemma, x: jax.Array) -> jax.Array:
    """Logits `[B, T, V]` of the stream or streams after a layer, as of those after the last one."""
    return logits_of(model, model.final_norm(_merge(model, x), model.runtime.numerics))


def logits_of(model: Gemma, x_BTD: jax.Array) -> jax.Array:
    """Logits `[B, T, V]` of what `final_norm` is captured as: those that `forward` gives."""
    if model.runtime.numerics.float16_matrices:
        model = with_float16_products(model)
    return _head(model, x_BTD, None)


def _merge(model: Gemma, x: jax.Array) -> jax.Array:
    return x if model.streams is None else model.streams.merge(x)


def _head(model: Gemma, x_BTD: jax.Array, last_B1: jax.Array | None) -> jax.Array:
    if last_B1 is not None and x_BTD.shape[1] > 1:
        x_BTD = tokens_at(last_B1, x_BTD, axis=1)
    with jax.named_scope("head"):
        logits_BTV = model.embed.decode(x_BTD).astype(jnp.float32)
        if (cap := model.soft_cap) is not None:
            logits_BTV = cap * jnp.tanh(logits_BTV / cap)
    return logits_BTV
