"""Workers as the scripts here see them: processes that do a piece of work when asked for it."""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

WORKERS = Path(__file__).parent / "workers"


@dataclass
class Rival:
    """One running worker and what it has measured: tokens per second, by kind of work."""

    name: str
    process: subprocess.Popen
    log: IO[str]  # what it prints
    facts: dict = field(default_factory=dict)
    runs: dict[str, list[float]] = field(default_factory=dict)
    results: dict[str, list[int]] = field(default_factory=dict)  # of the last run of each work
    spent_s: float = 0.0

    def ask(self, work: str, **request) -> float:
        """Has a piece of work done; returns the seconds that the worker measured."""
        start = time.perf_counter()
        print(json.dumps({"work": work, **request}), file=self.process.stdin, flush=True)
        answer = self.listen()
        self.spent_s += time.perf_counter() - start
        self.results[work] = answer["result"]
        return answer["seconds"]

    def listen(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            last_line = self.log.read().strip().rpartition("\n")[2]
            raise RuntimeError(f"{self.name}: process ended with code {code}: {last_line}")
        return json.loads(line)

    def peak_bytes(self) -> int:
        """Largest resident size of the process so far, where Linux tells it."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (peak,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) * 1024

    def median(self, work: str) -> float:
        return statistics.median(self.runs[work])


@contextmanager
def start(
    name: str, python: str, worker: str, variant: str, paths: dict[str, str]
) -> Iterator[Rival]:
    """The worker of a rival, loaded and ready."""
    command = [python, str(WORKERS / worker), variant, json.dumps(paths)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, **pipes)
        try:
            rival = Rival(name, process, log)
            rival.facts = rival.listen()
            yield rival
        finally:
            process.stdin.close()
            process.wait()
