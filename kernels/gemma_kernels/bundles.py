"""Planned cycles of a TPU kernel, as its compiler writes them down, and which of them run when.

A TPU core executes one bundle of instructions per cycle, in an order that is fixed when a kernel is
compiled. libtpu writes it to a folder on request (`DUMP`); here it is read into

    outside      bundles before and after the loop over the grid
    step         bundles of the loop that run in every step
    live         bundles around a body: they run where a body may run, and call none themselves
    bodies       parts that use the matrix unit, in the order of the code: what conditions choose,
                 loops inside a step (once through), or else the whole step
    edges        conditional parts without matrix work, as the start and the end of a sweep

No TPU is needed, and none is measured: waiting for memory is not in a plan.
"""

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PASSES = ".*(packed-bundles-post-ra|pre-delay).*"
BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z,! ]+)?:([ >]*)")
KERNEL = re.compile(r"\d+-(.*?)(?:\.\d+)?-\d+-")
JUMP = re.compile(r"sbr\.rel \([^)]*\) target bundleno = (\d+)")


@dataclass(frozen=True)
class Schedule:
    """Bundles (cycles) of one kernel, by when they run; `spills` are stores of registers."""

    kernel: str
    outside: int
    step: int
    live: int
    bodies: list[int]
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
    chip: str, jobs: Sequence[Job], python: str = sys.executable
) -> Iterator[list[Schedule] | str]:
    """Schedules of each job's kernels on `chip`; of one that does not compile, the error.

    The compiler takes its orders when it is loaded, so a process of its own runs it.

    Args:
      python: Interpreter to run it with: others' kernels may need another environment.
    """
    from gemma_kernels.targets import WITHOUT_A_TPU

    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
        flags += f"--xla_jf_dump_llo_pass_label_regex={PASSES}"
        env = os.environ | WITHOUT_A_TPU | {"JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": flags}
        home = str(Path(__file__).parents[1])
        env["PYTHONPATH"] = os.pathsep.join([home, os.environ.get("PYTHONPATH", "")]).strip(":")
        worker = subprocess.Popen(
            [python, "-m", "gemma_kernels.bundles", chip, folder],
            env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        with worker:
            for job in jobs:
                print(json.dumps(asdict(job)), file=worker.stdin, flush=True)
                answer = worker.stdout.readline()
                if not answer:
                    raise RuntimeError(f"{python} ended while it compiled {job}")
                answer = json.loads(answer)
                if "error" in answer:
                    yield answer["error"]
                else:
                    yield [Schedule(**fields) for fields in answer["schedules"]]
            worker.stdin.close()


def _serve(chip: str, folder: Path) -> None:
    """Reads jobs as lines of JSON and answers each with a line."""
    from gemma_kernels.targets import lower

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
    depth, parts = [], []
    for line in text.splitlines():
        if bundle := BUNDLE.match(line):
            empty = line.endswith("{}")  # a stall: written without its depth
            depth.append(depth[-1] if empty and depth else bundle[2].count(">"))
            here = len(depth)
            for target in map(int, JUMP.findall(line)):
                if target > here:  # what lies between is conditional
                    parts.append(range(here, target))
                elif depth[-1] > 1:  # a loop inside a step
                    parts.append(range(target, here))
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
    around = {
        number
        for number, part in enumerate(parts)
        if not matrix[number] and any(parts[body].start in part for body in bodies)
    }
    plain = [b for b, d in enumerate(depth) if d and owner[b] is None]
    always = any(used[b][slots.index("MATMUL")] for b in plain if b < len(used))
    spill = slots.index("VSTORE:SPILL")
    return Schedule(
        kernel=kernel,
        outside=sum(d == 0 for d in depth),
        step=0 if always else len(plain),
        live=sum(cycles[number] for number in around),
        bodies=[len(plain)] * always + [cycles[number] for number in bodies],
        edges=sum(c for n, c in enumerate(cycles) if n not in around and n not in bodies),
        spills=sum(row[spill] for row in used),
    )


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
