"""What a user sees while waiting: a bar on stderr, and nothing where that is no terminal."""

import sys
import time
from collections.abc import Mapping


class Bar:
    """A bar that vanishes when its block ends, or earlier by `stop`: text may share its terminal.

    Args:
      title: Shown with the amounts, while there are some.
      unit, scale: Of the amounts; `scale` of what is reported make one unit.
      idle: Shown before the first amount and after the last. JAX compiles a program at its first
        call, which is most of such a wait.
    """

    def __init__(self, title: str, unit: str = "", scale: int = 1, idle: str = "compiling"):
        self._title, self._unit, self._scale, self._idle = title, unit, scale, idle
        self._progress = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn()
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task(idle, total=None)

    def __call__(self, done: int, total: int) -> None:
        """Reports how much is done; the signature of every `progress=` of the library."""
        if self._progress is None:
            return
        if done < total:
            amounts = f"{done / self._scale:,.0f} of {total / self._scale:,.0f} {self._unit}"
            self._progress.update(
                self._task, description=f"{self._title}, {amounts}", completed=done, total=total
            )
        else:
            self._progress.update(self._task, description=self._idle, completed=0, total=None)

    def __enter__(self) -> "Bar":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


class Steps:
    """A bar of a run of training, which watches it; where stderr is no terminal, a line now and
    then.

    Args:
      total: Steps of the run.
    """

    def __init__(self, total: int):
        self._total, self._bar, self._said = total, None, 0.0
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("compiling", total=total)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the numbers of a step."""
        if "loss" not in values:
            self._note(f"step {step}: held-out loss {values['held_out_loss']:.4f}")
            return
        text = f"step {step} of {self._total}, loss {values['loss']:.4f}"
        if "tokens_per_second" in values:
            text += f", {values['tokens_per_second']:,.0f} tokens/s"
        if "mfu" in values:
            text += f", MFU {values['mfu']:.1%}"
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=step)
        elif step in (1, self._total) or time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._note(text)

    def text(self, step: int, name: str, text: str) -> None:
        """Shows what the model wrote."""
        self._note(f"step {step}: {name!r} -> {text!r}")

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def __enter__(self) -> "Steps":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _note(self, line: str) -> None:
        self._said = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)


SECONDS_BETWEEN_LINES = 10


def steps(total: int) -> Steps:
    return Steps(total)


def loading() -> Bar:
    return Bar("loading weights", "MB", 1_000_000, idle="loading weights")


def saving() -> Bar:
    return Bar("writing", "MB", 1_000_000, idle="writing")


def reading() -> Bar:
    return Bar("reading text", "tokens")


def embedding() -> Bar:
    return Bar("embedding", "texts")


def asking() -> Bar:
    return Bar("asking", "requests")


def listening() -> Bar:
    return Bar("listening", "s")


def compiling() -> Bar:
    return Bar("")
