"""Trains a model, and keeps a run alive: it saves, measures, and goes on where it was killed.

Two runs of the same config take the same steps, bit for bit, however often one of them is killed
and resumed: all that a step depends on is in what is saved (parameters, moments, key, number of the
step, position in the data), and data are read again from that position.
"""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax

from gemma_jax.decoder.model import Gemma
from gemma_jax.runs.folder import METRICS, STOPPED, RunFolder
from gemma_jax.runs.watch import Lines, Watcher
from gemma_jax.training.accumulate import weight_of
from gemma_jax.training.loop import LossError, Moment, SpikeGuard
from gemma_jax.training.loop import steps as take_steps
from gemma_jax.training.objectives import next_token
from gemma_jax.training.placing import place_batch, state_shardings
from gemma_jax.training.state import TrainState
from gemma_jax.training.step import Objective, make_step
from gemma_jax.training.trainable import Trainable, trainable

if TYPE_CHECKING:
    from pathlib import Path

    from gemma_checkpoints import TrainingStates

SIGTERM_CODE = 128 + signal.SIGTERM  # exit code of a process that a signal ended
HELD_OUT = "held_out_loss"
THINGS = ("evaluate", "sample", "save")  # in this order: what is saved knows its held-out loss


@dataclass(frozen=True, kw_only=True)
class Every:
    """Says how often things happen beside training, in steps; 0: at the end alone.

    Attributes:
      save: Keep what the run goes on from, in a run with a folder.
      evaluate: Measure the loss on held-out data.
      sample: Let the model write.
      log: Tell watchers the numbers of a step.

    Raises:
      ValueError: A number below 0, or below 1 for `log`.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.Every(save=500, log=10)
      Every(save=500, evaluate=100, sample=0, log=10)
    """

    save: int = 100
    evaluate: int = 100
    sample: int = 0
    log: int = 1

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 0 or (name == "log" and value < 1):
                raise ValueError(
                    f"{name}={value} must be {1 if name == 'log' else 0} or more steps"
                )


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Holds what happens beside training, and what it needs.

    Attributes:
      every: How often.
      held_out: Batches to measure the loss on, the same ones each time.
      write: From a model to texts by name, for watchers.
      watchers: Are told of everything.
      guard: When a loss is a spike.
      rate: From the number of a step to its learning rate, for watchers.
      speed: From a batch and the seconds of its step to numbers for watchers.

    Examples:
      >>> import gemma_jax as gj
      >>> beside = gj.Beside(every=gj.Every(evaluate=20), guard=gj.SpikeGuard(times=10.0))
      >>> beside.every.evaluate, beside.guard.times
      (20, 10.0)
    """

    every: Every = field(default_factory=Every)
    held_out: Iterable[Any] = ()
    write: Callable[[Gemma], Mapping[str, str]] | None = None
    watchers: Sequence[Watcher] = ()
    guard: SpikeGuard = field(default_factory=SpikeGuard)
    rate: Callable[[int], float] | None = None
    speed: Callable[[Any, float], Mapping[str, float]] = lambda batch, seconds: {}


def train(
    model: Gemma | Trainable,
    data: Iterable[Any],
    objective: Objective = next_token,
    *,
    optimizer: optax.GradientTransformation,
    steps: int,
    seed: int = 0,
    micro_batches: int = 1,
    folder: "str | Path | None" = None,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    beside: Beside = Beside(),
) -> Gemma:
    """Trains a model, and returns what comes out.

    With a folder the run survives: SIGTERM and Ctrl-C save and end it, a process that was killed is
    gone on with by `resume`, as if nothing had happened. If the iterator over the data has
    `get_state` and `set_state` (`gj.make_data`, all of Grain), data are read on from where they
    were; of others, as many batches are read again and dropped.

    Args:
      model: All of whose parameters are trained; or what `trainable`, `lora` return.
      data: Batches for the objective. If it has `batch_ids`, as `gj.make_data` has, that names the
        rows of a batch by its number, for when something is wrong with one.
      steps: In all; a run ends earlier if the data do.
      seed: Of whatever the objective draws.
      micro_batches: Parts of a batch that are computed one after the other; see `make_step`.
      folder: Of the run; see `gemma_jax.runs.folder`. Default: nothing is kept.
      resume: Go on with the run in the folder, if there is one.
      config: What the run is, to be written down; a run with another one is not gone on with.

    Raises:
      ValueError: The folder is taken, or the run in it is another one.
      LossError: The loss is not finite or leaps; says on which rows, in `stopped.json` too.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> import optax
      >>> model, tok = gj.load("checkpoints/digits", modalities=("text",), layout="scan")
      >>> tokens = np.array([tok.encode("Which digit is left?", bos=True)])
      >>> trained = gj.train(model, [tokens] * 20, optimizer=optax.adam(1e-2), steps=20)
      >>> print(f"{gj.loss(model, tokens):.2f} -> {gj.loss(trained, tokens):.2f}")
      6.74 -> 0.00
    """
    parts = model if isinstance(model, Trainable) else trainable(model)
    run = _Run(parts, data, objective, optimizer, seed, micro_batches, beside, steps)
    if folder is None:
        return run.through(None)
    place = RunFolder(folder, resume=resume)
    with place.locked():
        place.refuse_other(config or {})
        place.describe(config or {})
        return run.through(place)


@dataclass
class _Run:
    """One run, while it goes on."""

    parts: Trainable
    data: Iterable[Any]
    objective: Objective
    optimizer: optax.GradientTransformation
    seed: int
    micro_batches: int
    beside: Beside
    until: int
    signalled: list[int] = field(default_factory=list)
    ending: int = 0  # the signal on which all processes end after this step

    def through(self, folder: RunFolder | None) -> Gemma:
        """All steps that are left."""
        init, step = make_step(
            self.objective, self.optimizer, self.parts.join, micro_batches=self.micro_batches
        )
        given = self.parts.trained, jax.random.key(self.seed)
        if (partition := self._partition()) is not None:  # made where it lies, by all processes
            shapes = replace(jax.eval_shape(init, *given), trained=self.parts.trained)
            init = jax.jit(init, out_shardings=state_shardings(shapes, partition))
        state = init(*given)
        if folder is None:
            return self._steps(step, state, iter(self.data), None, None)
        from gemma_checkpoints import TrainingStates

        states = TrainingStates(folder.states)
        try:
            state, iterator = self._resumed(states, state)
            folder.forget_after(int(state.step))
            with _signals(self.signalled):
                return self._steps(step, state, iterator, folder, states)
        finally:
            states.close()

    def _resumed(self, states: "TrainingStates", state: TrainState):
        """The state to begin at, and the data from there on."""
        iterator = iter(self.data)
        if states.latest is None:
            return state, iterator
        state, facts = states.restore(state)
        if hasattr(iterator, "set_state"):
            iterator.set_state(facts["data"])
        else:
            for _ in range(int(state.step)):
                next(iterator, None)
        return state, iterator

    def _steps(self, step, state: TrainState, iterator, folder, states) -> Gemma:
        beside, partition = self.beside, self._partition()
        outputs = (jax.tree.map(lambda a: a.sharding, state), None)
        compiled = jax.jit(step, donate_argnums=0, out_shardings=outputs)
        watchers = [*([Lines(folder)] if folder else []), *beside.watchers]
        lines = folder.lines(METRICS) if folder else []
        moments = take_steps(
            compiled,
            state,
            self.parts.frozen,
            iterator,
            until=self.until,
            wait=self._stops_at,
            guard=beside.guard,
            losses=[line["loss"] for line in lines if "loss" in line],
            inputs=lambda batch: _placed(batch, partition, int(self.micro_batches > 1)),
        )
        moment = None
        try:
            if int(state.step) == 0 and not any(line["step"] == 0 for line in lines):
                self._pause(watchers, state, iterator, None, THINGS)  # what was there before
            began = time.perf_counter()
            for moment in moments:
                now = time.perf_counter()
                self._tell(watchers, moment, now - began)
                if moment.state is not None:
                    state = moment.state
                    self._pause(watchers, state, iterator, states, self._due(moment.step))
                    if self.ending and moment.step < self.until:
                        _leave(self.ending, moment.step, folder)
                    now = time.perf_counter()  # what happens beside is no part of a step
                began = now
            if moment is not None:
                left = [what for what in THINGS if what not in self._due(moment.step)]
                self._pause(watchers, state, iterator, states, left)
        except LossError as error:
            if folder is None:
                raise
            named = getattr(self.data, "batch_ids", None)
            rows = named(error.step - 1) if named is not None else None
            said = {"step": error.step, "why": str(error), "metrics": error.metrics, "rows": rows}
            folder.write(STOPPED, said)
            raise LossError(
                f"{error}; rows and numbers are in {folder.path / STOPPED}; step {states.latest} "
                "is kept",
                error.step,
                error.batch,
                error.metrics,
            ) from None
        finally:
            for watcher in watchers:
                watcher.close()
        return self.parts.join(state.trained, self.parts.frozen)

    def _partition(self):
        model = self.parts.join(self.parts.trained, self.parts.frozen)
        return getattr(model, "model", model).runtime.partition

    def _due(self, step: int) -> list[str]:
        """What happens after this step; a run that is to end only saves, as it may have no time."""
        if self.ending:
            return ["save"]
        every = vars(self.beside.every)
        return [what for what in THINGS if every[what] and step % every[what] == 0]

    def _stops_at(self, step: int) -> bool:
        """Whether something needs the state after this step."""
        self.ending = _agreed(self.signalled[0] if self.signalled else 0)
        return bool(self.ending) or bool(self._due(step))

    def _tell(self, watchers: Sequence[Watcher], moment: Moment, seconds: float) -> None:
        beside = self.beside
        if moment.step % beside.every.log and moment.step != self.until:
            return
        values = dict(moment.metrics)
        if beside.rate is not None:
            values["rate"] = float(beside.rate(moment.step - 1))
        values["seconds"] = seconds
        values |= beside.speed(moment.batch, seconds)
        for watcher in watchers:
            watcher.scalars(moment.step, values)

    def _pause(self, watchers, state: TrainState, iterator, states, due: Sequence[str]) -> None:
        """Does what is due at this state."""
        step, loss = int(state.step), None
        if "evaluate" in due and (loss := self._held_out_loss(state)) is not None:
            for watcher in watchers:
                watcher.scalars(step, {HELD_OUT: loss})
        if "sample" in due and self.beside.write is not None:
            model = self.parts.join(state.trained, self.parts.frozen)
            for name, text in self.beside.write(model).items():
                for watcher in watchers:
                    watcher.text(step, name, text)
        if "save" in due and states is not None:
            known = hasattr(iterator, "get_state")
            states.save(state, {"data": iterator.get_state()} if known else {}, loss)

    def _held_out_loss(self, state: TrainState) -> float | None:
        """Mean over all held-out batches, each counting as much as it weighs."""
        total = weight = 0.0
        partition = self._partition()
        for batch in self.beside.held_out:
            batch = _placed(batch, partition)
            loss, of_batch = self._measure(state.trained, self.parts.frozen, batch)
            total, weight = total + float(loss) * float(of_batch), weight + float(of_batch)
        return total / weight if weight else None

    def __post_init__(self):
        key = jax.random.key(self.seed)

        def measure(trained, frozen, batch):
            loss, metrics = self.objective(self.parts.join(trained, frozen), batch, key)
            return loss, weight_of(metrics)

        self._measure = jax.jit(measure)


def _placed(batch: Any, partition: Any, stacked: int = 0) -> Any:
    """The batch on the devices of a mesh, by its letters; as it is without one."""
    return batch if partition is None else place_batch(batch, partition, stacked=stacked)


def _agreed(here: int) -> int:
    """What the first process says: all of them have to stop at the same step."""
    if jax.process_count() == 1:
        return here
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.asarray(here)))


@contextlib.contextmanager
def _signals(seen: list[int]) -> Iterator[None]:
    """Notes SIGTERM and Ctrl-C, so that a step can end; a second one ends the process at once."""

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        for one, handler in before.items():
            signal.signal(one, handler)

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    except ValueError:  # not in the main thread, whose matter signals are
        pass
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, step: int, folder: RunFolder) -> None:
    print(f"step {step} is saved in {folder.path}; go on by --resume", file=sys.stderr)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(SIGTERM_CODE)
