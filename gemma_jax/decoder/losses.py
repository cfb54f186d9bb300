"""Losses of next tokens. The logits of all tokens never exist at one time."""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma


def loss(
    model: Gemma,
    batch: Batch | jax.typing.ArrayLike | Sequence[Sequence[int]],
    *,
    targets_BT: jax.Array | None = None,
    weights_BT: jax.Array | None = None,
    z_loss: float = 0.0,
) -> jax.Array:
    """Computes the mean cross-entropy of the next token (nats), a float32 scalar to differentiate.

    Args:
      batch: See `forward`.
      targets_BT: What should follow each token, -1 where it does not matter. By default the token
        that does follow, unless it is padding, a soft token, or the first of another text.
      weights_BT: How much each target counts in the mean; by default all count alike. Aligned with
        the targets if those are given, else with the tokens.
      z_loss: See `gemma_kernels.cross_entropy`.

    Returns:
      The weighted mean; 0 if nothing counts.

    Raises:
      ValueError: Tokens or widths that `forward` refuses, or a model that reads both ways.

    Examples:
      >>> import gemma_jax as gj
      >>> import jax
      >>> import numpy as np
      >>> model, tok = gj.load("checkpoints/digits", modalities=("text",), layout="scan")
      >>> tokens = np.array([tok.encode("Which digit is left?", bos=True)])
      >>> loss, gradients = jax.value_and_grad(gj.loss)(model, tokens)
      >>> print(f"{loss:.2f}")
      6.74
    """
    batch = Batch.of(batch)
    batch.check(model.cfg)
    return loss_and_weight(
        model, batch, targets_BT=targets_BT, weights_BT=weights_BT, z_loss=z_loss
    )[0]


@partial(jax.jit, static_argnames=("z_loss",))
def loss_and_weight(
    model: Gemma,
    batch: Batch | jax.Array,
    *,
    targets_BT: jax.Array | None = None,
    weights_BT: jax.Array | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Computes `loss`, and the weight of all targets together, over which it is the mean."""
    batch = Batch.of(batch)
    targets_BT, weights_BT = targets_of(batch, targets_BT, weights_BT)
    losses_BT = token_losses(
        model, final_norm(model, batch), targets_BT, weights_BT=weights_BT, z_loss=z_loss
    )
    total = jnp.sum(counts_of(model, targets_BT, weights_BT))
    return jnp.sum(losses_BT) / jnp.where(total == 0, 1, total), total


def targets_of(
    batch: Batch, targets_BT: jax.Array | None = None, weights_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """What should follow each token, -1 where it does not matter, and weights aligned with that.

    Args:
      targets_BT, weights_BT: As they are given to `loss`.
    """
    if targets_BT is not None:
        return targets_BT, weights_BT
    return _following(batch), None if weights_BT is None else _shift(weights_BT, 0)


def counts_of(model: Gemma, targets_BT: jax.Array, weights_BT: jax.Array | None) -> jax.Array:
    """How much each target counts: float32, 0 where it is no entry of the vocabulary.

    Raises:
      ValueError: A model that reads both ways, and so sees what it should guess.
    """
    model.cfg.require_causal("has no next token to guess")
    known_BT = (targets_BT >= 0) & (targets_BT < model.cfg.vocab_size)
    return known_BT * (jnp.float32(1) if weights_BT is None else weights_BT.astype(jnp.float32))


def final_norm(model: Gemma, batch: Batch) -> jax.Array:
    """What the head reads: `[B, T, D]`."""
    return forward(model, batch, logits="none", capture=("final_norm",)).captured["final_norm"]


def token_losses(
    model: Gemma,
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    *,
    weights_BT: jax.Array | None = None,
    z_loss: float = 0.0,
) -> jax.Array:
    """Computes the cross-entropy of each token from the `final_norm` that `forward` captures.

    Logits are in float32 whatever the dtype of the activations is; those of `forward` have been
    rounded to it.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> model, tok = gj.load("checkpoints/digits")
      >>> ids = np.array([tok.encode("Which digit is left?", bos=True)])
      >>> out = gj.forward(model, ids[:, :-1], logits="none", capture=("final_norm",))
      >>> gj.token_losses(model, out.captured["final_norm"], ids[:, 1:]).shape
      (1, 5)
    """
    return model.embed.cross_entropy(
        x_BTD, targets_BT, weights_BT=weights_BT, soft_cap=model.soft_cap, z_loss=z_loss
    )


def _following(batch: Batch) -> jax.Array:
    """The token after each, -1 where none of the same text follows that a model could say."""
    next_BT = _shift(batch.tokens_BT, -1)
    if (positions_BT := batch.positions_BT) is not None:
        follows_BT = (positions_BT >= 0) & (_shift(positions_BT, -1) > positions_BT)
        next_BT = jnp.where(follows_BT, next_BT, -1)
    if (documents_BT := batch.documents_BT) is not None:
        next_BT = jnp.where(_shift(documents_BT, -1) == documents_BT, next_BT, -1)
    if batch.soft is not None:
        next_BT = jnp.where(_shift(batch.soft.index_BT, -1) < 0, next_BT, -1)
    return next_BT


def _shift(array_BT: jax.Array, last: int) -> jax.Array:
    """Every entry in the place before it, `last` in the last."""
    return jnp.pad(array_BT[:, 1:], ((0, 0), (0, 1)), constant_values=last)
