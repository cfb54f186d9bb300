"""Servers as processes on the loopback, started by their own commands."""

import shlex
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

PATIENCE = 600.0  # seconds to load and compile


@dataclass
class Running:
    """One server that answers.

    Attributes:
      words: Its command.
      log: What it prints.
      ready_s: From its start until it answered.
    """

    name: str
    words: list[str]
    port: int
    process: subprocess.Popen
    log: IO[str]
    ready_s: float = 0.0
    version: str = ""
    rounds: list[dict] = field(default_factory=list)

    def resident_bytes(self) -> int:
        """Its resident size now, where Linux tells it."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (size,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(size.split()[1]) * 1024

    def last_words(self) -> str:
        """The end of what it printed."""
        self.log.seek(0)
        return self.log.read()[-2000:]

    def command(self, paths: Sequence[str]) -> str:
        """Its command line, with PATH in place of these paths."""
        return shlex.join(Path(w).name if w in paths else w for w in self.words)


@contextmanager
def start(name: str, words: Sequence[str]) -> Iterator[Running]:
    """A server once it is ready; ended with the block.

    Args:
      words: Its command; `{port}` stands for the port where it shall listen.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    filled = [word.replace("{port}", str(port)) for word in words]
    with tempfile.TemporaryFile("w+") as log:
        began = time.perf_counter()
        process = subprocess.Popen(filled, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        running = Running(name, filled, port, process, log)
        try:
            _wait(running)
            running.ready_s = time.perf_counter() - began
            yield running
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(running: Running) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if running.process.poll() is not None:
            raise RuntimeError(f"{running.name} ended at its start: {running.last_words()}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"{running.name} was not ready in {PATIENCE:g} s: {running.last_words()}")
