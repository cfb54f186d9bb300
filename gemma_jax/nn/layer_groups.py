"""Layer specs -> runs that can be scanned. Pure data, no arrays.

A stack of layers is cut into groups, each a period of layers repeated some number of times.
Parameters of the layers at the same place in the period are stacked along a leading axis, and one
`lax.scan` runs the repeats. Gemma 3 4B (34 layers, every sixth global) becomes six-layer periods
five times, then one local layer four times: compile time stops growing with depth.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from gemma_jax.config import LayerSpec

Layout = Literal["scan", "unrolled"]


@dataclass(frozen=True)
class LayerGroup:
    """`period` repeated `repeats` times; the first layer has index `start`."""

    period: tuple[LayerSpec, ...]
    repeats: int
    start: int

    def layer_index(self, position: int, repeat: int) -> int:
        """Index in the whole stack of the layer at `position` of the period's `repeat`-th run."""
        return self.start + repeat * len(self.period) + position

    def stretches(self, layers: range) -> Iterator[tuple[slice, range]]:
        """Those of its layers that lie in `layers`: positions of the period, and which repeats.

        Whole periods come as one stretch, and what is left of a period before and after as others.
        """
        length = len(self.period)
        first = max(layers.start - self.start, 0)
        stop = min(layers.stop - self.start, length * self.repeats)
        while first < stop:
            repeat, position = divmod(first, length)
            count = (stop - first) // length if position == 0 else 0
            end = length if count else min(position + stop - first, length)
            yield slice(position, end), range(repeat, repeat + max(count, 1))
            first += (end - position) * max(count, 1)


def group_layers(specs: tuple[LayerSpec, ...], layout: Layout = "scan") -> tuple[LayerGroup, ...]:
    """Cuts `specs` into groups that, flattened, give `specs` back.

    `"scan"` takes, from the front, the period that covers most layers by repeating (the shorter
    one if several do). `"unrolled"` is one group of all layers, run once: slower to compile,
    but every weight is an array of its own, which spares XLA's CPU backend a copy per use.
    """
    if layout == "unrolled":
        return (LayerGroup(tuple(specs), 1, 0),)
    if layout != "scan":
        raise ValueError(f"{layout=} must be 'scan' or 'unrolled'")
    groups, start = [], 0
    while start < len(specs):
        length, repeats = _best_period(specs[start:])
        groups.append(LayerGroup(tuple(specs[start : start + length]), repeats, start))
        start += length * repeats
    return tuple(groups)


def _best_period(specs: tuple[LayerSpec, ...]) -> tuple[int, int]:
    best = (1, 1)
    for length in range(1, len(specs) // 2 + 1):
        repeats = 1
        while specs[repeats * length : (repeats + 1) * length] == specs[:length]:
            repeats += 1
        if repeats > 1 and length * repeats > best[0] * best[1]:
            best = (length, repeats)
    return best
