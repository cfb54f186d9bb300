"""What a model would say after each of its layers: the head, applied to the residual stream.

nostalgebraist, "interpreting GPT: the logit lens", 2020.

Local letters: X choices that are kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.forward import forward, unembed
from gemma_jax.decoder.losses import targets_of
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.patching import Patch

BLOCK = 64  # tokens of a row whose logits are held at once


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LogitLens:
    """What `logit_lens` reads off each layer, in float32; the last layer is the model itself.

    Attributes:
      ids_LBTX: int32, the likeliest next tokens, best first.
      probs_LBTX: Their probabilities.
      next_log_probs_LBT: Of the token that does follow, in nats; NaN where none is known.
      next_ranks_LBT: int32, how many tokens are likelier than it; -1 where none is known.
      kl_LBT: From the last layer's distribution p to the layer's q, `sum p log(p / q)`, in nats.
      logits_LBTV: `None` unless asked for.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model, tok = gj.load("checkpoints/digits")
      >>> lens = gj.logit_lens(model, [tok.encode("Which digit is left?", bos=True)], top_k=2)
      >>> lens.ids_LBTX.shape, lens.kl_LBT.shape
      ((3, 1, 6, 2), (3, 1, 6))
    """

    ids_LBTX: jax.Array
    probs_LBTX: jax.Array
    next_log_probs_LBT: jax.Array
    next_ranks_LBT: jax.Array
    kl_LBT: jax.Array
    logits_LBTV: jax.Array | None = None


def logit_lens(
    model: Gemma,
    batch: Batch | jax.typing.ArrayLike | Sequence[Sequence[int]],
    *,
    top_k: int = 5,
    logits: bool = False,
    patch: Patch | None = None,
) -> LogitLens:
    """Reads the residual stream after every layer as if it were the last: final norm and head.

    Gemma 3n's streams are merged first, as after its last layer. Logits are made block by block;
    all of them, `[L, B, T, V]`, are held only if asked for.

    Args:
      batch: As `forward` takes it.
      top_k: How many of the likeliest tokens to keep.
      logits: Whether to keep them all; those of the last layer are `forward`'s.
      patch: As `forward` takes it.

    Raises:
      ValueError: What `forward` refuses, a model that reads both ways, or another `top_k`.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model, tok = gj.load("checkpoints/digits")
      >>> ids = np.array([tok.encode("Which digit is left?", bos=True)])
      >>> lens = gj.logit_lens(model, ids)
      >>> bool((lens.ids_LBTX[-1, ..., 0] == gj.forward(model, ids).logits.argmax(-1)).all())
      True
    """
    if not 1 <= top_k <= model.cfg.vocab_size:
        raise ValueError(f"{top_k=} must lie in [1, {model.cfg.vocab_size}]")
    model.cfg.require_causal("has no next token to read off its layers")
    batch = Batch.of(batch)
    targets_BT = targets_of(batch)[0]
    which: Literal["all", "none"] = "all" if logits else "none"
    out = forward(model, batch, logits=which, capture="layer_outputs", patch=patch)
    x = out.captured["layer_outputs"]
    found = _read(model, x, targets_BT, top_k=top_k)
    if not logits:
        return found
    each = [*(unembed(model, one) for one in x[:-1]), out.logits]
    return LogitLens(**(vars(found) | {"logits_LBTV": jnp.stack(each)}))


@partial(jax.jit, static_argnames="top_k")
def _read(model: Gemma, x: jax.Array, targets_BT: jax.Array, *, top_k: int) -> LogitLens:
    """Of layers `[L, (A,) B, T, D]`, in blocks of tokens."""
    T = x.shape[-2]
    blocks, width = -(-T // BLOCK), min(T, BLOCK)
    missing = blocks * width - T
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])
    x = x.reshape(*x.shape[:-2], blocks, width, x.shape[-1])
    targets_BT = jnp.pad(targets_BT, ((0, 0), (0, missing)), constant_values=-1)
    targets = targets_BT.reshape(-1, blocks, width)
    one = partial(_read_block, model, top_k)
    found = jax.lax.map(lambda a: one(*a), (jnp.moveaxis(x, -3, 0), jnp.moveaxis(targets, 1, 0)))

    def joined(a: jax.Array) -> jax.Array:  # blocks, L, B, tokens of a block, ...
        a = jnp.moveaxis(a, 0, 2)
        return a.reshape(*a.shape[:2], blocks * width, *a.shape[4:])[:, :, :T]

    return jax.tree.map(joined, found)


def _read_block(model: Gemma, top_k: int, x: jax.Array, targets_BT: jax.Array) -> LogitLens:
    last_BTV = jax.nn.log_softmax(unembed(model, x[-1]))
    known_BT = (targets_BT >= 0) & (targets_BT < model.cfg.vocab_size)
    targets_BT1 = jnp.where(known_BT, targets_BT, 0)[..., None]

    def read(x: jax.Array) -> LogitLens:
        log_probs_BTV = jax.nn.log_softmax(unembed(model, x))
        best_BTX, ids_BTX = jax.lax.top_k(log_probs_BTV, top_k)
        next_BT1 = jnp.take_along_axis(log_probs_BTV, targets_BT1, axis=-1)
        ranks_BT = (log_probs_BTV > next_BT1).sum(-1)
        difference_BTV = jnp.where(last_BTV > -jnp.inf, last_BTV - log_probs_BTV, 0)
        return LogitLens(
            ids_LBTX=ids_BTX,
            probs_LBTX=jnp.exp(best_BTX),
            next_log_probs_LBT=jnp.where(known_BT, next_BT1[..., 0], jnp.nan),
            next_ranks_LBT=jnp.where(known_BT, ranks_BT, -1).astype(jnp.int32),
            kl_LBT=(jnp.exp(last_BTV) * difference_BTV).sum(-1),
        )

    return jax.lax.map(read, x)
