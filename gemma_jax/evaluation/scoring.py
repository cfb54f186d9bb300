"""Log-probabilities of given text."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch, token_array
from gemma_jax.decoder.cache import Cache
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.losses import token_losses
from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.prefill import bucket
from gemma_jax.placement import empty_cache

CHUNK = 1024  # tokens of one pass


def score(
    model: Gemma,
    token_ids: Sequence[int],
    *,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Computes the log-probability (nats) of every token but the first, given those before it.

    Runs in chunks over a cache, so neither the logits nor the activations of a long text ever exist
    at once.

    Args:
      token_ids: One text, beginning with BOS if the model should see one.

    Returns:
      float32 `[len(token_ids) - 1]`.

    Raises:
      ValueError: Text in the place of ids, fewer than two tokens, more than the context holds, or
        ids outside `[0, V)`.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> gj.score(model, tok.encode("Which digit is left?", bos=True)).round(1)
      array([-5.4, -7.2, -6. , -6.1, -9.1], dtype=float32)
    """
    ids = np.asarray(token_array(token_ids), np.int64)
    cfg = model.cfg
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"scoring needs a list of at least two token ids, got {ids.shape=}")
    if len(ids) > cfg.max_positions:
        raise ValueError(f"{len(ids)} tokens do not fit the context of {cfg.max_positions}")
    if ids.min() < 0 or ids.max() >= cfg.vocab_size:
        raise ValueError(f"ids must lie in [0, {cfg.vocab_size}), got {ids.min()} to {ids.max()}")
    width = min(CHUNK, bucket(len(ids) - 1))
    cache = empty_cache(model, 1, bucket(len(ids)))
    scores = []
    for start in range(0, len(ids) - 1, width):
        inputs, targets = ids[start : start + width], ids[start + 1 : start + width + 1]
        inputs = inputs[: len(targets)]
        padding = (0, width - len(targets))
        positions = np.pad(np.arange(start, start + len(targets)), padding, constant_values=-1)
        logs_T, cache = _score_chunk(
            model,
            cache,
            jnp.asarray(np.pad(inputs, padding)[None], jnp.int32),
            jnp.asarray(positions[None], jnp.int32),
            jnp.asarray(np.pad(targets, padding, constant_values=-1)[None], jnp.int32),
        )
        scores.append(np.asarray(logs_T)[: len(targets)])
        if progress is not None:
            progress(start + len(targets), len(ids) - 1)
    return np.concatenate(scores)


@partial(jax.jit, donate_argnames=("cache",))
def _score_chunk(
    model: Gemma, cache: Cache, tokens_BT: jax.Array, positions_BT: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, Cache]:
    out = forward(
        model, Batch(tokens_BT, positions_BT), cache=cache, logits="none", capture=("final_norm",)
    )
    return -token_losses(model, out.captured["final_norm"], targets_BT)[0], out.cache
