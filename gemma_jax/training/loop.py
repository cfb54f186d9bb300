"""The loop over steps: one batch after the other, and a stop when the loss is no longer one.

    for moment in steps(step, state, frozen, batches, until=100):
        print(moment.step, moment.metrics["loss"])
    state = moment.state

A device computes one step while the loop looks at the numbers of the one before, except where the
caller asks for a moment at once (`wait`), to save it or to measure.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import jax

from gemma_jax.training.state import TrainState
from gemma_jax.training.step import Metrics, Step


class LossError(ArithmeticError):
    """Says that training has gone wrong, at which step and on which batch.

    Attributes:
      step: Number of the step, from 1.
      batch: What it was computed on, as the data gave it.
      metrics: What the step said.

    Examples:
      >>> import gemma_jax as gj
      >>> def train():  # stands for `gj.train`
      ...     raise gj.LossError("the loss is nan", 2, [[5, 6]], {"loss": float("nan")})
      >>> try:
      ...     train()
      ... except gj.LossError as error:
      ...     error.step, error.batch
      (2, [[5, 6]])
    """

    def __init__(self, message: str, step: int, batch: Any, metrics: dict[str, float]):
        super().__init__(message)
        self.step, self.batch, self.metrics = step, batch, metrics


@dataclass(frozen=True)
class Moment:
    """What a run is after one of its steps.

    Attributes:
      step: Steps so far.
      metrics: Of this step, as numbers.
      batch: What it was computed on.
      state: After the step; `None` where a later step has been begun already, which takes its
        arrays.
    """

    step: int
    metrics: dict[str, float]
    batch: Any
    state: TrainState | None


@dataclass(frozen=True)
class SpikeGuard:
    """Tells a loss that leaps from one that wavers.

    Attributes:
      times: A loss above so many times the median of the last ones is a spike; infinity: none is.
      among: So many of the last ones.
      after: Steps before the first loss can be one.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.Beside(guard=gj.SpikeGuard(times=5.0, after=100)).guard.among
      50
    """

    times: float = 3.0
    among: int = 50
    after: int = 20


def steps(
    step: Step,
    state: TrainState,
    frozen: Any,
    batches: Iterable[Any],
    *,
    until: int,
    wait: Callable[[int], bool] = lambda step: False,
    guard: SpikeGuard = SpikeGuard(),
    losses: Sequence[float] = (),
    inputs: Callable[[Any], Any] = lambda batch: batch,
) -> Iterator[Moment]:
    """Takes steps until the state has had so many of them, or the batches end.

    Args:
      step: Compiled; see `make_step`. It may take the arrays of a state away (`donate_argnums`).
      state: Where to begin, at whatever step it is.
      batches: Asked for one batch just before its step.
      until: Steps in all, those before this state included.
      wait: Says of a step whether the state after it is wanted.
      guard: What counts as a spike.
      losses: Of earlier steps, by which the guard tells what is usual.
      inputs: From a batch to what the step reads of it.

    Yields:
      A moment per step, in order; the last one always with its state.

    Raises:
      LossError: A loss or gradients that are not finite, or a spike. What a step does with such
        gradients is its own matter; this comes at most one step later.

    Examples:
      >>> import gemma_jax as gj
      >>> import itertools
      >>> import jax
      >>> import numpy as np
      >>> import optax
      >>> from gemma_jax.training.loop import steps
      >>> model, tok = gj.load("checkpoints/digits", modalities=("text",), layout="scan")
      >>> tokens = np.array([tok.encode("Which digit is left?", bos=True)])
      >>> trained, frozen, join = gj.trainable(model)
      >>> init, step = gj.make_step(gj.next_token, optax.sgd(0.01), join)
      >>> state, step = init(trained, jax.random.key(0)), jax.jit(step, donate_argnums=0)
      >>> moments = list(steps(step, state, frozen, itertools.repeat(tokens), until=3))
      >>> [moment.step for moment in moments], int(moments[-1].state.step)
      ([1, 2, 3], 3)
    """
    at, said = int(state.step), _Losses(guard, losses)
    pending: tuple[int, Metrics, Any] | None = None
    iterator = iter(batches)
    while at < until and (batch := next(iterator, _END)) is not _END:
        state, metrics = step(state, frozen, inputs(batch))
        at += 1
        if pending is not None:
            yield said.moment(*pending, None)
        pending = (at, metrics, batch)
        if wait(at) or at == until:
            yield said.moment(*pending, state)
            pending = None
    if pending is not None:
        yield said.moment(*pending, state)


_END = object()


class _Losses:
    """The last losses, and what they say of the next."""

    def __init__(self, guard: SpikeGuard, before: Sequence[float]):
        self.guard, self.last = guard, deque(before, maxlen=guard.among)

    def moment(self, at: int, metrics: Metrics, batch: Any, state: TrainState | None) -> Moment:
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        loss, norm = numbers["loss"], numbers["grad_norm"]
        if not (math.isfinite(loss) and math.isfinite(norm)):
            text = f"step {at}: loss {loss}, norm of the gradients {norm}"
            raise LossError(text, at, batch, numbers)
        guard, usual = self.guard, median(self.last) if self.last else math.inf
        if len(self.last) >= guard.after and loss > guard.times * usual > 0:
            text = f"step {at}: loss {loss:.4g}, {loss / usual:.1f} times the usual {usual:.4g}"
            raise LossError(text, at, batch, numbers)
        self.last.append(loss)
        return Moment(at, numbers, batch, state)
