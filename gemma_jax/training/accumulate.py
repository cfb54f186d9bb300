"""Gradients of several small batches as those of one: each counts as much as it has tokens.

The mean of the means of two batches is not the mean over both where they hold different numbers of
tokens. So gradients, loss and metrics are weighted by the objective's metric `tokens`, else by its
`pairs`; an objective with neither counts every batch alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.batch import Batch
from gemma_jax.multimodal.media import Media
from gemma_jax.training.objectives import TrainBatch
from gemma_jax.training.trainable import Params

Metrics = dict[str, jax.Array]
Gradient = Callable[[Params, Any, jax.Array], tuple[tuple[jax.Array, Metrics], Params]]
COUNTS = ("tokens", "pairs")  # metrics that say over how much a loss is the mean; they add up


def weight_of(metrics: Metrics) -> jax.Array:
    """How much a batch counts, a float32 scalar."""
    found = [metrics[name] for name in COUNTS if name in metrics]
    return jnp.asarray(found[0] if found else 1.0, jnp.float32)


def accumulated(gradient: Gradient, trained: Params, batches: Any, key: jax.Array):
    """The loss, metrics and gradients of all batches together, as `gradient` gives those of one.

    One batch is held in memory at a time, and one sum of gradients in float32. A batch in which
    nothing counts adds nothing, whatever its gradients are.

    Args:
      batches: Arrays with an axis in front, `[M, ...]`, of the batches.
      key: Of the step; each batch draws from this and its place.
    """
    (count,) = {len(leaf) for leaf in jax.tree.leaves(batches)}

    def of_one(i, batch):
        (value, metrics), gradients = gradient(trained, batch, jax.random.fold_in(key, i))
        weight = weight_of(metrics)
        sums = jax.tree.map(
            lambda a: jnp.where(weight == 0, 0, a.astype(jnp.float32) * weight),
            (value, {k: v for k, v in metrics.items() if k not in COUNTS}, gradients),
        )
        counts = {name: metrics[name].astype(jnp.float32) for name in COUNTS if name in metrics}
        return sums, counts, weight

    def add(total, numbered):
        return jax.tree.map(jnp.add, total, of_one(*numbered)), None

    first = jax.tree.map(lambda a: a[0], batches)
    zero = jax.tree.map(
        lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(of_one, jnp.uint32(0), first)
    )
    numbers = jnp.arange(count, dtype=jnp.uint32)
    (sums, counts, weight), _ = jax.lax.scan(add, zero, (numbers, batches))
    means = jax.tree.map(lambda a: a / jnp.where(weight == 0, 1, weight), sums)
    value, metrics, gradients = means
    return (value, metrics | counts), gradients


def stack_micro_batches(batches: Sequence[TrainBatch | Batch | jax.Array]) -> TrainBatch:
    """Puts batches of different numbers of rows into one, for a step with `micro_batches`.

    Rows that are missing are added: their tokens are padding, at positions -1, and count nothing.
    Rows have the same length already.

    Returns:
      NumPy arrays `[M, B, ...]`.

    Raises:
      ValueError: Images and sounds, of which the batches hold different numbers.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> rows = np.array([[2, 5, 7], [2, 8, 9], [2, 4, 6]])
      >>> gj.stack_micro_batches([rows[:1], rows[1:]]).weights_BT.tolist()
      [[[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]]
    """
    whole = [_with_positions(TrainBatch.of(batch)) for batch in batches]
    _check_items([batch.media for batch in whole])
    return jax.tree_util.tree_map_with_path(lambda path, *arrays: _stack(path, arrays), *whole)


def _check_items(media: Sequence[Media | None]) -> None:
    """Items of a second modality are counted after all of the first: none may be added there."""
    counts = [[len(jax.tree.leaves(one)[0]) for one in m.inputs.values()] for m in media if m]
    if any(len(one) > 1 and one != counts[0] for one in counts):
        raise ValueError(
            f"batches with {' and '.join(map(str, counts))} items of several modalities: fill them "
            "up to the same numbers before Media is made"
        )


def _with_positions(batch: TrainBatch) -> TrainBatch:
    """The same with what says of a row that nothing in it counts."""
    tokens = np.asarray(batch.batch.tokens_BT)
    positions, weights = batch.batch.positions_BT, batch.weights_BT
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    weights = np.ones(tokens.shape, np.float32) if weights is None else weights
    return replace(batch, batch=replace(batch.batch, positions_BT=positions), weights_BT=weights)


FILL = {"positions_BT": -1, "targets_BT": -1, "index_BT": -1}  # and 0 for all else


def _stack(path: tuple[Any, ...], arrays: Sequence[jax.Array]) -> np.ndarray:
    fill, most = FILL.get(getattr(path[-1], "name", ""), 0), max(map(len, arrays))

    def padded(array) -> np.ndarray:
        missing = np.full((most - len(array), *array.shape[1:]), fill, array.dtype)
        return np.concatenate([array, missing])

    return np.stack([padded(np.asarray(array)) for array in arrays])
