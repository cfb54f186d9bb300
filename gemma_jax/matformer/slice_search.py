"""Which slice is best for its size."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma

from .sensitivity import FRACTIONS, Measure, width_of
from .slicing import at, parameters, slice_model
from .submodel import Slice, slice_config

Widths = tuple[int, ...]  # of the layers that are kept


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


def search(
    model: Gemma,
    tokens_BT: np.ndarray,
    budget: int,
    *,
    fractions: Sequence[float] = FRACTIONS,
    skip_blocks: bool = True,
) -> list[Point]:
    """Finds the best slice of at most `budget` parameters, and slices of the sizes above.

    Uniform slices, the same fraction of every layer, are measured first. From the whole model, and
    from the smallest uniform slice above the budget, the search narrows one layer by one step again
    and again, the one that costs least loss per parameter saved by its own `sensitivity`. The best
    slice that fits, uniform ones among them, is where it then goes on: one layer a step wider for
    another a step narrower, as long as the loss falls. So no uniform slice of the size is better
    than the one that is found. With `skip_blocks`, every legal model without one block of the
    local/global pattern is searched in the same way, and the best of all is taken.

    Args:
      tokens_BT, fractions: As in `sensitivity`.
      budget: Parameters besides the tables that are looked up; see `slicing.parameters`.

    Returns:
      All slices above the budget that were measured on the way, the whole model first and then by
      size, and as the last one the best that fits.

    Raises:
      ValueError: As in `sensitivity`, or a budget that no such slice meets.
    """
    found: list[Point] = []
    for skip in [(), *(_skippable(model.cfg) if skip_blocks else ())]:
        slices = WidthSlices(model, tokens_BT, skip, fractions)
        uniform = [slices.point(slices.uniform(f)) for f in sorted({1.0, *fractions}, reverse=True)]
        found += uniform
        too_large = [point for point in uniform if point.parameters > budget]
        for start in dict.fromkeys(too_large[:1] + too_large[-1:]):
            found += slices.narrow(start.submodel.widths(model.cfg), budget)
    if not (fitting := [point for point in found if point.parameters <= budget]):
        least = min(point.parameters for point in found)
        raise ValueError(f"no slice has {budget:,} parameters; the smallest tried has {least:,}")
    best = min(fitting, key=lambda point: (point.loss, point.parameters))
    slices = WidthSlices(model, tokens_BT, best.submodel.skip_layers, fractions)
    larger = {point.submodel: point for point in found if point.parameters > budget}
    by_size = sorted(larger.values(), key=lambda point: -point.parameters)
    return [*by_size, slices.exchange(best, budget)]


class WidthSlices:
    """Slices of a model that keep the same layers and differ in their widths."""

    def __init__(
        self, model: Gemma, tokens_BT: np.ndarray, skip: tuple[int, ...], fractions: Sequence[float]
    ):
        self.cfg, self.skip = model.cfg, skip
        self.full = tuple(s.d_ff for i, s in enumerate(model.cfg.layers) if i not in skip)
        # Widths to choose from, for each layer, widest first.
        self.options = [
            sorted({full, *(width_of(full, f) for f in fractions)}, reverse=True)
            for full in self.full
        ]
        base = model  # without the layers left out
        if skip:
            unrolled = len(model.layer_groups) == 1 and model.layer_groups[0].repeats == 1
            whole = Slice(ffn_widths=self.full, skip_layers=skip)
            base = (at if unrolled else slice_model)(model, whole)
        self._measure = Measure(base, tokens_BT)
        self._losses: dict[Widths, float] = {}
        self._sizes: dict[int, int] = {}  # by channels: one costs the same in every layer

    def loss(self, widths: Widths) -> float:
        if widths not in self._losses:
            self._losses[widths] = self._measure(widths)
        return self._losses[widths]

    def size(self, widths: Widths) -> int:
        channels = sum(widths)
        if channels not in self._sizes:
            submodel = Slice(ffn_widths=widths, skip_layers=self.skip)
            self._sizes[channels] = parameters(slice_config(self.cfg, submodel))
        return self._sizes[channels]

    def point(self, widths: Widths) -> Point:
        submodel = Slice(ffn_widths=widths, skip_layers=self.skip)
        return Point(submodel, self.size(widths), self.loss(widths))

    def uniform(self, fraction: float) -> Widths:
        return tuple(width_of(full, fraction) for full in self.full)

    def step(self, widths: Widths, layer: int, by: int) -> Widths | None:
        """With one layer so many steps narrower, or wider if negative; `None` if it cannot be."""
        place = self.options[layer].index(widths[layer]) + by
        if not 0 <= place < len(self.options[layer]):
            return None
        return (*widths[:layer], self.options[layer][place], *widths[layer + 1 :])

    def narrow(self, widths: Widths, budget: int) -> Iterator[Point]:
        """Narrows the layer whose next step is the cheapest, until the budget is met.

        What a step costs is measured once, with all other layers at the widths of the start.
        """
        steps = {i: self._steps_down(widths, i) for i in range(len(widths))}
        while self.size(widths) > budget and (open_ := [i for i in steps if steps[i]]):
            cheapest = min(open_, key=lambda i: steps[i][-1][0])
            _, width = steps[cheapest].pop()
            widths = (*widths[:cheapest], width, *widths[cheapest + 1 :])
            yield self.point(widths)

    def _steps_down(self, widths: Widths, layer: int) -> list[tuple[float, int]]:
        """Loss per channel saved and the new width, of each step of one layer; the last is next."""
        steps, before = [], widths
        while after := self.step(before, layer, 1):
            # What a step happens to gain does not pay for the next one.
            cost = max(self.loss(after) - self.loss(before), 0.0)
            steps.append((cost / (before[layer] - after[layer]), after[layer]))
            before = after
        return steps[::-1]

    def exchange(self, point: Point, budget: int) -> Point:
        """Moves channels from one layer to another for as long as the loss falls."""
        while better := next(self._better(point, budget), None):
            point = better
        return point

    def _better(self, point: Point, budget: int) -> Iterator[Point]:
        """Slices that are better by one exchange; first those that promise most."""
        wider, narrower = self._moves(point, -1), [(0.0, {}), *self._moves(point, 1)]
        promising = [
            (gain + cost, widened | narrowed)
            for gain, widened in wider
            for cost, narrowed in narrower
            if gain + cost < 0 and not widened.keys() & narrowed.keys()
        ]
        for _, move in sorted(promising, key=lambda pair: pair[0]):
            widths = point.submodel.widths(self.cfg)
            changed = tuple(move.get(i, w) for i, w in enumerate(widths))
            if self.size(changed) <= budget and self.loss(changed) < point.loss:
                yield self.point(changed)

    def _moves(self, point: Point, by: int) -> list[tuple[float, dict[int, int]]]:
        """Steps of single layers: what each adds to the loss, and layer -> new width."""
        widths, moves = point.submodel.widths(self.cfg), []
        for layer in range(len(widths)):
            if after := self.step(widths, layer, by):
                moves.append((self.loss(after) - point.loss, {layer: after[layer]}))
        return moves


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
