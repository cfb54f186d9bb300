"""What a user sees while waiting: a bar on stderr, and nothing where that is no terminal."""

import sys


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


def loading() -> Bar:
    return Bar("loading weights", "MB", 1_000_000, idle="loading weights")


def saving() -> Bar:
    return Bar("writing", "MB", 1_000_000, idle="writing")


def reading() -> Bar:
    return Bar("reading text", "tokens")


def listening() -> Bar:
    return Bar("listening", "s")


def compiling() -> Bar:
    return Bar("")
