"""The folder of a run.

| in it            | what it is                                                              |
|------------------|-------------------------------------------------------------------------|
| `run.json`       | what runs: config, versions of packages, revision of the source         |
| `metrics.jsonl`  | a line per step                                                         |
| `samples.jsonl`  | texts that the model wrote on the way                                   |
| `states/STEP`    | what a run goes on from: the last moments, and the best                 |
| `stopped.json`   | the step, its numbers and the rows of its batch, where the loss failed  |
| `loss.png`       | losses over steps                                                       |
| `model`, or `adapter` | what came out                                                      |
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from gemma_jax.atomic_files import replacing

RUN, METRICS, SAMPLES, STATES = "run.json", "metrics.jsonl", "samples.jsonl", "states"
STOPPED, PLOT = "stopped.json", "loss.png"
PACKAGES = ("gemma-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain")


class RunFolder:
    """Where a run writes. Only the first of several processes does, but for states.

    Args:
      path: A new or empty folder, or that of a run to be resumed; made when it is locked.
      resume: Go on with the run that is there; without one, begin.

    Raises:
      ValueError: The folder holds something already, and `resume` is not given; or it holds
        something that is no run.
    """

    def __init__(self, path: str | Path, *, resume: bool = False):
        self.path = Path(path)
        taken = self.path.is_dir() and any(p.name != LOCK for p in self.path.iterdir())
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path}: a file is in the way; choose another folder")
        begun = (self.path / RUN).is_file()
        if taken and not begun:
            raise ValueError(f"{self.path} holds something that is no run; choose a new folder")
        if taken and not resume:
            raise ValueError(
                f"{self.path} holds a run; go on with it by --resume (resume=True), or choose "
                "a new folder"
            )
        self.begun, self.writes = begun, jax.process_index() == 0
        if jax.process_count() > 1:  # all of them have looked before the first one writes
            multihost_utils.sync_global_devices("folder of the run")

    @property
    def states(self) -> Path:
        return self.path / STATES

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Held while a run goes on; the system lets go of it however the process ends.

        Raises:
          ValueError: Another process runs here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.writes:
            yield
            return
        with open(self.path / LOCK, "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{self.path}: another process is training here") from None
            yield

    def describe(self, config: Mapping[str, Any]) -> None:
        """Writes down what runs; one line for each time that it was begun or resumed."""
        if not self.writes:
            return
        path = self.path / RUN
        said = json.loads(path.read_text("utf-8")) if path.is_file() else {"config": config}
        said["started"] = [*said.get("started", ()), _environment()]
        with replacing(path) as part:
            part.write_text(json.dumps(said, indent=1) + "\n", "utf-8")

    def refuse_other(self, config: Mapping[str, Any]) -> None:
        """Raises `ValueError` if the run that is here has another config."""
        if not self.begun:
            return
        before, now = _flat(self.config), _flat(config)
        wrong = [
            f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name) and name.split(".")[0] not in FREE
        ]
        if wrong:
            raise ValueError(f"{self.path} holds another run: {'; '.join(wrong)}")

    @property
    def config(self) -> dict[str, Any]:
        """What `describe` was told first."""
        return json.loads((self.path / RUN).read_text("utf-8"))["config"]

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Puts one JSON object in the place of a file."""
        if self.writes:
            with replacing(self.path / name) as part:
                part.write_text(json.dumps(value, indent=1) + "\n", "utf-8")

    def append(self, name: str, value: Mapping[str, Any]) -> None:
        """Adds a line of JSON to a file."""
        if self.writes:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(json.dumps(value) + "\n")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The lines of a file; a last one that was cut off by the end of a process is left out."""
        path = self.path / name
        if not path.is_file():
            return []
        whole, _, _ = path.read_text("utf-8").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def forget_after(self, step: int) -> None:
        """Drops the lines of steps that will be taken again."""
        for name in (METRICS, SAMPLES):
            if self.writes and (self.path / name).is_file():
                kept = [line for line in self.lines(name) if line["step"] <= step]
                with replacing(self.path / name) as part:
                    part.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
        if self.writes:
            (self.path / STOPPED).unlink(missing_ok=True)


LOCK = ".lock"
FREE = ("steps", "every")  # what a resumed run may have otherwise


def _flat(config: Mapping[str, Any], front: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, Mapping)
        flat |= _flat(value, f"{front}{name}.") if inner else {front + name: value}
    return flat


def _environment() -> dict[str, Any]:
    """Versions and devices, by which a result can be made again."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    devices = jax.devices()
    return {
        "packages": versions,
        "python": platform.python_version(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "revision": _revision(),
    }


def _revision() -> str | None:
    """Of the repository that this source lies in, with `+` if it has changes; `None` outside."""
    here = Path(__file__).parent
    try:
        command = ["git", "-C", os.fspath(here), "describe", "--always", "--dirty=+", "--abbrev=12"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None if said.returncode == 0 else None
