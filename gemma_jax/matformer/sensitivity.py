"""How much each layer's width matters, and which slice is best for its size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.losses import loss
from gemma_jax.decoder.model import Gemma

from .slicing import at, parameters, slice_model
from .submodel import Slice, slice_config

FRACTIONS = (0.75, 0.5, 0.25)


@dataclass(frozen=True)
class Point:
    """One slice that was measured.

    Attributes:
      parameters: See `slicing.parameters`.
      loss: Mean negative log-likelihood of the next token, nats.
    """

    submodel: Slice
    parameters: int
    loss: float


def sensitivity(
    model: Gemma, tokens_BT: np.ndarray, fractions: Sequence[float] = FRACTIONS
) -> np.ndarray:
    """Increase of the loss when one layer alone is narrowed, nats per token, `[L, fractions]`.

    Args:
      tokens_BT: Text to measure on; -1 for padding on the right.
      fractions: Of each layer's width, rounded up to whole channels.

    Raises:
      ValueError: A fraction outside (0, 1], or text without a next token.
    """
    measure = _Measure(model, tokens_BT)
    full_L = np.array([spec.d_ff for spec in model.cfg.layers])
    whole = measure(full_L)
    return np.array([
        [measure(_narrowed(full_L, i, _width(full_L[i], f))) - whole for f in fractions]
        for i in range(len(full_L))
    ])  # fmt: skip


def search(
    model: Gemma,
    tokens_BT: np.ndarray,
    budget: int,
    *,
    fractions: Sequence[float] = FRACTIONS,
    skip_blocks: bool = True,
) -> list[Point]:
    """Slices from the whole model down to `budget` parameters, each measured; the last one fits.

    Greedy: again and again the layer is narrowed by one step that costs least loss per parameter
    saved, by each layer's own `sensitivity`. With `skip_blocks` the same is done from every legal
    model that leaves out blocks of the local/global pattern, and the path that ends best is taken.

    Args:
      tokens_BT, fractions: As in `sensitivity`.
      budget: Parameters besides the tables that are looked up; see `slicing.parameters`.

    Raises:
      ValueError: As in `sensitivity`, or a budget that no such slice meets.
    """
    starts = [(), *(_skippable(model.cfg) if skip_blocks else ())]
    paths = [_path(model, tokens_BT, budget, fractions, skip) for skip in starts]
    if not (reached := [path for path in paths if path and path[-1].parameters <= budget]):
        least = min(path[-1].parameters for path in paths if path)
        raise ValueError(f"no slice has {budget:,} parameters; the smallest tried has {least:,}")
    return min(reached, key=lambda path: path[-1].loss)


def _path(
    model: Gemma,
    tokens_BT: np.ndarray,
    budget: int,
    fractions: Sequence[float],
    skip: tuple[int, ...],
) -> list[Point]:
    layers = [spec.d_ff for i, spec in enumerate(model.cfg.layers) if i not in skip]
    start = Slice(ffn_widths=tuple(layers), skip_layers=skip)
    base = model  # without the layers left out
    if skip:
        unrolled = len(model.layer_groups) == 1 and model.layer_groups[0].repeats == 1
        base = (at if unrolled else slice_model)(model, start)
    steps = sorted(fractions, reverse=True)
    cost = np.cumsum(np.maximum(np.diff(sensitivity(base, tokens_BT, steps), prepend=0), 0), axis=1)
    measure, widths = _Measure(base, tokens_BT), np.array(layers)
    taken = np.zeros(len(layers), int)  # steps down, of each layer

    def point() -> Point:
        submodel = Slice(ffn_widths=tuple(widths.tolist()), skip_layers=skip)
        return Point(submodel, parameters(slice_config(model.cfg, submodel)), measure(widths))

    points = [point()]
    while points[-1].parameters > budget and (taken < len(steps)).any():

        def price(i: int) -> float:
            """Loss per channel of the next step down."""
            before = cost[i, taken[i] - 1] if taken[i] else 0.0
            saved = widths[i] - _width(layers[i], steps[taken[i]])
            return (cost[i, taken[i]] - before) / max(saved, 1)

        i = min((i for i in range(len(layers)) if taken[i] < len(steps)), key=price)
        widths[i] = _width(layers[i], steps[taken[i]])
        taken[i] += 1
        points.append(point())
    return points


def _skippable(cfg: GemmaConfig) -> Iterator[tuple[int, ...]]:
    """Whole blocks that may be left out, one at a time."""
    kinds = [spec.kind for spec in cfg.layers]
    period = kinds.index("global") + 1 if "global" in kinds else 1
    for first in range(0, len(kinds), period):
        skip = tuple(range(first, min(first + period, len(kinds))))
        widths = tuple(spec.d_ff for i, spec in enumerate(cfg.layers) if i not in skip)
        try:
            slice_config(cfg, Slice(ffn_widths=widths, skip_layers=skip))
        except ValueError:
            continue
        yield skip


class _Measure:
    """Loss of a model on a text, as a function of its layers' widths: one compiled program."""

    def __init__(self, model: Gemma, tokens_BT: np.ndarray):
        tokens_BT = np.asarray(tokens_BT, np.int32)
        if tokens_BT.ndim != 2 or not (tokens_BT[:, 1:] >= 0).any():
            raise ValueError(
                f"tokens_BT of shape {list(tokens_BT.shape)} must be [B, T] with T of 2 or more"
            )
        real_BT = tokens_BT >= 0
        positions_BT = np.where(real_BT, np.arange(tokens_BT.shape[1], dtype=np.int32), -1)
        self.model, self.tokens_BT = model, jnp.asarray(np.maximum(tokens_BT, 0))
        self.positions_BT = jnp.asarray(positions_BT)

    def __call__(self, widths_L: np.ndarray) -> float:
        widths = jnp.asarray(widths_L, jnp.int32)
        batch = Batch(self.tokens_BT, self.positions_BT, ffn_widths_L=widths)
        return float(loss(self.model, batch))


def _narrowed(full_L: np.ndarray, layer: int, width: int) -> np.ndarray:
    return np.where(np.arange(len(full_L)) == layer, width, full_L)


def _width(full: int, fraction: float) -> int:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction {fraction} of a width must lie in (0, 1]")
    return int(np.ceil(full * fraction))
