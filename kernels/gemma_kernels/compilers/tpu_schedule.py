"""Planned cycles of a TPU kernel, as its compiler writes them down, and which of them run when.

A TPU core executes one bundle of instructions per cycle, in an order that is fixed when a kernel is
compiled. libtpu writes it to a folder on request (`DUMP`); here it is read into

    outside      bundles before and after the loop over the grid
    step         bundles of the loop that run in every step
    bodies       parts that use the matrix unit, in the order of the code: what conditions choose,
                 loops inside a step (once through), or else the whole step
    live         for each body, bundles around it that run as often as it may run
    entry        for each body in a loop, bundles around that loop, which run once for all its turns
    edges        conditional parts without matrix work, as the start and the end of a sweep

No TPU is needed, and none is measured: waiting for memory is not in a plan.
"""

import importlib
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from gemma_kernels.compilers.source_hash import source_hash

PASSES = ".*(packed-bundles-post-ra|pre-delay).*"
BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z,! ]+)?:([ >]*)")
KERNEL = re.compile(r"\d+-(.*?)(?:\.\d+)?-\d+-")
JUMP = re.compile(r"sbr\.rel \([^)]*\) target bundleno = (\d+)")

SLACK = 1.03  # a schedule that is longer by more is slower


@dataclass(frozen=True)
class Schedule:
    """Bundles (cycles) of one kernel, by when they run; `spills` are stores of registers."""

    kernel: str
    outside: int
    step: int
    bodies: list[int]
    live: list[int]
    entry: list[int]
    edges: int
    spills: int


@dataclass(frozen=True)
class Job:
    """One kernel to compile.

    Attributes:
      builder: `"module:function"` or `"file.py:function"`; called with `args` it gives a function
        of arrays, and their shapes and dtypes.
      args: Keyword arguments of the builder, as JSON has them.
      kernel: Part of the name of the kernels whose schedules are wanted.
    """

    builder: str
    args: dict
    kernel: str


def planned(
    chip: str, jobs: Sequence[Job], python: str = sys.executable, limit: float | None = None
) -> Iterator[list[Schedule] | str]:
    """Schedules of each job's kernels on `chip`; of one that does not compile, the error.

    The compiler takes its orders when it is loaded, so a process of its own runs it.

    Args:
      python: Interpreter to run it with: others' kernels may need another environment.
      limit: Seconds for one job, after which it counts as one that does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        left = list(jobs)
        while left:
            with _worker(chip, folder, python) as worker:
                while left and (answer := _ask(worker, left[0], limit)) is not None:
                    del left[0]
                    if "error" in answer:
                        yield answer["error"]
                    else:
                        yield [Schedule(**fields) for fields in answer["schedules"]]
                with suppress(BrokenPipeError):
                    worker.stdin.close()
            if left and limit is None:
                raise RuntimeError(f"{python} ended while it compiled {left[0]}")
            if left:
                del left[0]
                yield f"its compiler ended, or took more than {limit:.0f} seconds"


def comparable(stored: dict) -> bool:
    """Whether stored results come from the compiler that is installed; if not, says so."""
    made_by = stored["versions"]["libtpu"]
    same = version("libtpu") == made_by
    if not same:
        print(f"stored with libtpu {made_by}: another compiler, not compared")
    return same


def is_slower(name: str, cycles: int, stored: int) -> bool:
    """Whether a kernel is planned to take longer than what is stored, which is printed as well."""
    slower = cycles > SLACK * stored
    print(f"{name:32}{cycles:>11,} stored {stored:>11,}" + slower * "  SLOWER", flush=True)
    return slower


def described(what: str, files: Iterable[str], rows: list[dict]) -> dict:
    """Results as they are stored, with the command, versions and sources that made them.

    Args:
      what: What the figures are, for people.
      files: What they depend on; see `source_hash`.
    """
    return {
        "command": "python " + " ".join(sys.argv),
        "versions": {name: version(name) for name in ("jax", "libtpu")}
        | {"python": platform.python_version()},
        "what": what,
        "sources": source_hash(files),
        "rows": rows,
    }


def check(
    path: Path, stored: dict, rows: list[dict], name: Callable[[dict], str], files: Iterable[str]
) -> None:
    """Prints a line for each row, and exits with 1 if one is slower than stored.

    Where all rows were planned anew, the stored results are those of today's sources.
    """
    before = {name(row): row["cycles"] for row in stored["rows"]}
    if any([is_slower(name(row), row["cycles"], before[name(row)]) for row in rows]):
        sys.exit(1)
    if len(rows) == len(stored["rows"]):
        stored["sources"] = source_hash(files)
        path.write_text(json.dumps(stored, indent=2) + "\n")


def _worker(chip: str, folder: str, python: str) -> subprocess.Popen:
    from gemma_kernels.compilers.tpu_targets import WITHOUT_A_TPU

    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
    flags += f"--xla_jf_dump_llo_pass_label_regex={PASSES}"
    env = os.environ | WITHOUT_A_TPU | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
    home = str(Path(__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join([home, os.environ.get("PYTHONPATH", "")]).strip(":")
    return subprocess.Popen(
        [python, "-m", "gemma_kernels.compilers.tpu_schedule", chip, folder],
        env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _ask(worker: subprocess.Popen, job: Job, limit: float | None) -> dict | None:
    """The answer to a job; `None` if the process ended, by itself or by the limit."""
    timer = threading.Timer(limit or threading.TIMEOUT_MAX, worker.kill)
    timer.start()
    try:
        with suppress(BrokenPipeError):  # it ended before the job came
            print(json.dumps(asdict(job)), file=worker.stdin, flush=True)
        answer = worker.stdout.readline()
    finally:
        timer.cancel()
    return json.loads(answer) if answer else None


def _serve(chip: str, folder: Path) -> None:
    """Reads jobs as lines of JSON and answers each with a line."""
    from gemma_kernels.compilers.tpu_targets import lower

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries may print; stdout is for answers
    for line in sys.stdin:
        job = Job(**json.loads(line))
        for old in folder.iterdir():
            old.unlink()
        try:
            function, operands = _find(job.builder)(**job.args)
            lower(function, chip, *operands).compile()
            found = [asdict(schedule) for schedule in read_schedules(folder, job.kernel)]
            answer = {"schedules": found}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        print(json.dumps(answer), file=answers, flush=True)


def _find(builder: str):
    place, name = builder.rsplit(":", 1)
    if place.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(place).stem, place)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(place)
    return getattr(module, name)


def read_schedules(folder: Path, name: str) -> list[Schedule]:
    """Schedules of all kernels whose name contains `name`, in the order of their compilation."""
    texts = sorted(p for p in folder.glob("*[0-9]-packed-bundles-post-ra.txt") if name in p.name)
    uses = sorted(p for p in folder.glob("*per-bundle-utilization.txt") if name in p.name)
    if not texts or len(texts) != len(uses):
        raise ValueError(f"no schedule of a kernel called {name!r} in {folder}")
    return [
        _read(KERNEL.match(t.name)[1], t.read_text(errors="replace"), u.read_text())
        for t, u in zip(texts, uses)
    ]


def _read(kernel: str, text: str, use: str) -> Schedule:
    slots = [name.strip() for name in use.splitlines()[1].split(",")]
    rows = use.split("== UTILIZATION:")[1].splitlines()
    used = [list(map(int, row.split())) for row in rows if row.strip()]
    depth, parts, loops = [], [], []
    for line in text.splitlines():
        if bundle := BUNDLE.match(line):
            empty = line.endswith("{}")  # a stall: written without its depth
            depth.append(depth[-1] if empty and depth else bundle[2].count(">"))
            here = len(depth)
            for target in map(int, JUMP.findall(line)):
                if target > here:  # what lies between is conditional
                    parts.append(range(here, target))
                elif depth[target] > 1:  # a loop inside a step
                    loops.append(range(target, here))
    parts += loops
    owner: list[int | None] = [None] * len(depth)
    for number, part in sorted(enumerate(parts), key=lambda item: -len(item[1])):
        for b in part:
            owner[b] = number
    cycles, matrix = [0] * len(parts), [False] * len(parts)
    for b, number in enumerate(owner):
        if number is not None and depth[b]:
            cycles[number] += 1
            matrix[number] |= b < len(used) and used[b][slots.index("MATMUL")] > 0
    bodies = sorted((n for n in range(len(parts)) if matrix[n]), key=lambda n: parts[n].start)
    live, entry, around = [], [], set()
    for body in bodies:
        inside = [loop for loop in loops if parts[body].start in loop]
        turn = min(inside, key=len, default=range(len(depth)))  # what runs as often as the body
        over = [n for n in range(len(parts)) if not matrix[n] and parts[body].start in parts[n]]
        live.append(sum(cycles[n] for n in over if parts[n].start in turn))
        entry.append(sum(cycles[n] for n in over if parts[n].start not in turn))
        around |= set(over)
    plain = [b for b, d in enumerate(depth) if d and owner[b] is None]
    always = any(used[b][slots.index("MATMUL")] for b in plain if b < len(used))
    spill = slots.index("VSTORE:SPILL")
    return Schedule(
        kernel=kernel,
        outside=sum(d == 0 for d in depth),
        step=0 if always else len(plain),
        bodies=[len(plain)] * always + [cycles[number] for number in bodies],
        live=[0] * always + live,
        entry=[0] * always + entry,
        edges=sum(c for n, c in enumerate(cycles) if n not in around and n not in bodies),
        spills=sum(row[spill] for row in used),
    )


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
