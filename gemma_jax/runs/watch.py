"""Those who look on while a run goes on: a protocol of three methods, and what writes for them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from gemma_jax.runs.folder import METRICS, SAMPLES, RunFolder


class Watcher(Protocol):
    """Is told of a run. Weights & Biases, say, is another class with these three methods.

    Examples:
      >>> class Printer:
      ...     def scalars(self, step, values):
      ...         print(step, values["loss"])
      ...
      ...     def text(self, step, name, text): ...
      ...     def close(self): ...
    """

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Takes numbers of a step by name."""
        ...

    def text(self, step: int, name: str, text: str) -> None:
        """Takes what the model wrote."""
        ...

    def close(self) -> None:
        """Is called at the end, whatever that is."""
        ...


class Lines:
    """Writes JSON lines into the folder of a run."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.folder.append(METRICS, {"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        self.folder.append(SAMPLES, {"step": step, "prompt": name, "text": text})

    def close(self) -> None:
        pass


class TensorBoard:
    """Writes event files for TensorBoard; needs the extra `train`."""

    def __init__(self, folder: str | Path, resumed_at: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ImportError(
                "TensorBoard needs tensorboardX: pip install 'gemma-jax[train]'"
            ) from None
        self.writer = SummaryWriter(str(folder), purge_step=resumed_at or None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        self.writer.close()
