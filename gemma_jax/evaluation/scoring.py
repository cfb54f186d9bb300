"""Log-probabilities of given text."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch, token_array
from gemma_jax.decoder.cache import Cache
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.losses import token_losses
from gemma_jax.decoder.model import Gemma
from gemma_jax.evaluation.windows import Window, rolling_windows
from gemma_jax.inference.prefill import bucket
from gemma_jax.placement import empty_cache

CHUNK = 1024  # tokens of one pass


def score(
    model: Gemma,
    token_ids: Sequence[int],
    *,
    stride: int | None = None,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Computes the log-probability (nats) of every token but the first, given those before it.

    Runs in chunks over a cache, so neither the logits nor the activations of a long text ever exist
    at once.

    Args:
      token_ids: One text, beginning with BOS if the model should see one.
      stride: For texts longer than the context: they are scored in windows as long as it, each of
        which scores the next `stride` tokens, given those before them that still fit in. A small
        stride leaves every token more of a past, and takes longer; the context itself is the stride
        of lm-eval's rolling log-likelihood. See `gemma_jax.evaluation.windows`.
      window: Tokens that are read at most, in the place of the context. Without a stride, each
        window scores as many: so does lm-eval, where it is called `max_length`.
      progress: Told how many tokens have been read, and how many there are to read.

    Returns:
      float32 `[len(token_ids) - 1]`.

    Raises:
      ValueError: Text in the place of ids, fewer than two tokens, without a stride more than the
        context holds, a stride or a window longer than that, or ids outside `[0, V)`.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> gj.score(model, tok.encode("Which digit is left?", bos=True)).round(1)
      array([-5.4, -7.2, -6. , -6.1, -9.1], dtype=float32)
      >>> long = tok.encode("Which digit is left? " * 300, bos=True)
      >>> len(long), model.cfg.max_positions, gj.score(model, long, stride=512).shape
      (1801, 1024, (1800,))
    """
    if _are_texts(token_ids):
        raise ValueError("score takes one text; call it for each: [gj.score(model, ids) for ...]")
    ids = np.asarray(token_array(token_ids), np.int64)
    cfg = model.cfg
    if ids.ndim != 1 or len(ids) < 2:
        raise ValueError(f"scoring needs a list of at least two token ids, got {ids.shape=}")
    context = _context(cfg.max_positions, window)
    stride = window if stride is None else stride
    if stride is None and len(ids) > context:
        raise ValueError(
            f"{len(ids)} tokens do not fit the context of {context}; stride={context} scores them "
            "in windows, as lm-eval does, and a smaller one with more of a past"
        )
    if ids.min() < 0 or ids.max() >= cfg.vocab_size:
        raise ValueError(f"ids must lie in [0, {cfg.vocab_size}), got {ids.min()} to {ids.max()}")
    windows = [Window(0, 1, len(ids) - 1)]
    if stride is not None:
        windows = list(rolling_windows(len(ids), context, stride))
    total, read, scores = sum(one.stop - one.start for one in windows), 0, []
    for one in windows:
        for tokens, logs in _score_window(model, ids, one):
            scores.append(logs)
            if progress is not None:
                progress(read := read + tokens, total)
    return np.concatenate(scores)


def _are_texts(token_ids: object) -> bool:
    """Whether there are several rows of ids, or several strings."""
    several = isinstance(token_ids, (list, tuple)) and len(token_ids) > 1
    nested = several and (isinstance(token_ids[0], str) or np.ndim(token_ids[0]) > 0)
    return nested or np.ndim(token_ids if hasattr(token_ids, "shape") else 0) > 1


def _context(most: int, window: int | None) -> int:
    if window is None:
        return most
    if not isinstance(window, Integral) or not 1 <= window <= most:
        raise ValueError(f"window={window} must lie between 1 and {most}, the model's context")
    return int(window)


def _score_window(
    model: Gemma, ids: np.ndarray, window: Window
) -> Iterator[tuple[int, np.ndarray]]:
    """Tokens read and scores of each chunk; none in those in front of what the window scores."""
    length = window.stop - window.start
    width = min(CHUNK, bucket(length))
    cache = empty_cache(model, 1, bucket(min(length + 1, model.cfg.max_positions)))
    for start in range(window.start, window.stop, width):
        stop = min(start + width, window.stop)
        padding = (0, width - (stop - start))
        positions = np.pad(np.arange(start, stop) - window.start, padding, constant_values=-1)
        skipped = min(max(window.first - 1 - start, 0), stop - start)
        targets = np.where(np.arange(stop - start) < skipped, -1, ids[start + 1 : stop + 1])
        targets = np.pad(targets, padding, constant_values=-1)
        logs_T, cache = _score_chunk(
            model,
            cache,
            jnp.asarray(np.pad(ids[start:stop], padding)[None], jnp.int32),
            jnp.asarray(positions[None], jnp.int32),
            jnp.asarray(targets[None], jnp.int32) if skipped < stop - start else None,
        )
        scores = np.zeros(0, np.float32) if logs_T is None else np.asarray(logs_T)
        yield stop - start, scores[skipped : stop - start]


@partial(jax.jit, donate_argnames=("cache",))
def _score_chunk(
    model: Gemma,
    cache: Cache,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    targets_BT: jax.Array | None,
) -> tuple[jax.Array | None, Cache]:
    out = forward(
        model, Batch(tokens_BT, positions_BT), cache=cache, logits="none", capture=("final_norm",)
    )
    if targets_BT is None:
        return None, out.cache
    return -token_losses(model, out.captured["final_norm"], targets_BT)[0], out.cache
