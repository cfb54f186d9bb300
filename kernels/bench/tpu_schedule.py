"""Attention on TPU by its plan: cycles that the compiler schedules, beside splash attention.

    pip install -e ".[plan]"
    python kernels/bench/tpu_schedule.py --tokamax-python PATH \
        --output kernels/bench/results/tpu-schedule.json
    python kernels/bench/tpu_schedule.py --check kernels/bench/results/tpu-schedule.json

Needs no TPU, and measures none: see `gemma_kernels.bundles` for what a plan is. What counts is the
ratio of two kernels on one chip; waiting for memory is left out on both sides, and for ours the
time of its copies at the chip's bandwidth stands beside its cycles. Rivals are splash attention of
JAX and, with `--tokamax-python` (an interpreter of an environment that has tokamax and libtpu),
that of tokamax; of each the best of several tilings counts.

Cycles of a kernel, ours or theirs: its bodies as often as the grid runs them, what surrounds them
once per step, starts and ends of sweeps once per sweep.

`--check` compiles our kernels again and fails if one needs 3 % more cycles than stored.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from gemma_kernels.attention import tuning
from gemma_kernels.bundles import Job, Schedule, planned
from gemma_kernels.targets import CHIPS

SPLASH = str(Path(__file__).with_name("workers") / "splash.py")
SLACK = 1.03  # a schedule that is longer by more fails the check

# Tilings of rivals, by kind and whether there is a window: the best of a wider search, in which
# another one won on another chip or shape. `inner`: keys at a time within a block.
JAX, TOKAMAX = ("q", "k"), ("q", "k", "inner", "scheduler")
TILINGS = {
    ("jax", "forward", True): (JAX, [(512, 512), (1024, 512)]),
    ("jax", "forward", False): (JAX, [(1024, 1024)]),
    ("jax", "backward", True): (JAX, [(512, 512), (1024, 1024)]),
    ("jax", "backward", False): (JAX, [(1024, 1024)]),
    ("tokamax", "forward", True): (
        TOKAMAX,
        [(512, 512, 512, True), (512, 512, 256, False), (1024, 1024, 256, False)],
    ),
    ("tokamax", "forward", False): (
        TOKAMAX,
        [(2048, 2048, 512, True), (2048, 2048, 512, False), (2048, 2048, 1024, False)],
    ),
    ("tokamax", "backward", True): (
        TOKAMAX,
        [(512, 512, 512, False), (256, 256, 256, False), (1024, 1024, 1024, False)],
    ),
    ("tokamax", "backward", False): (TOKAMAX, [(1024, 1024, 1024, False)]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--shapes", help="names, separated by ';'; default: all")
    parser.add_argument("--kinds", default="forward,backward")
    parser.add_argument("--tokamax-python", help="interpreter with tokamax; default: without it")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with stored results")
    args = parser.parse_args()
    chips = args.chips.split(",")
    if args.check:
        sys.exit(check(json.loads(args.check.read_text()), chips, args.kinds.split(",")))
    names = args.shapes.split(";") if args.shapes else list(tuning.SHAPES)
    work = [(kind, name) for kind in args.kinds.split(",") for name in names]
    rows = [row for chip in chips for row in compare(chip, work, args.tokamax_python)]
    result = {
        "command": "python " + " ".join(sys.argv).replace(str(args.tokamax_python), "PATH"),
        "versions": versions(sys.executable)
        | ({"tokamax's environment": versions(args.tokamax_python)} if args.tokamax_python else {}),
        "what": "planned cycles, no TPU; useful: visible keys, share of the matrix unit's peak",
        "length": tuning.LENGTH,
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def compare(chip: str, work: list[tuple[str, str]], tokamax_python: str | None) -> list[dict]:
    """Rows of the table, printed as well."""
    blocks = [tuning.table_blocks(kind, name, chip) for kind, name in work]
    jobs = [tuning.job(kind, name, sizes) for (kind, name), sizes in zip(work, blocks)]
    ours = planned(chip, jobs)
    rivals = {"jax": rival_jobs(work, "jax")}
    if tokamax_python:
        rivals["tokamax"] = rival_jobs(work, "tokamax")
    found: dict[tuple[str, str], list] = {item: [] for item in work}
    for who, jobs in rivals.items():
        python = sys.executable if who == "jax" else tokamax_python
        for (item, job), schedules in zip(jobs, planned(chip, [job for _, job in jobs], python)):
            if not isinstance(schedules, str):  # a tiling that does not fit this chip
                cycles = rival_cycles(item, job.args, schedules)
                found[item].append((cycles, who, job.args))
    rows = []
    for (kind, name), sizes, schedules in zip(work, blocks, ours):
        if isinstance(schedules, str):
            sys.exit(f"{kind}, {name}, {chip}: {schedules}")
        plan = tuning.cost(kind, name, chip, sizes, schedules[0])
        peak = tuning.useful_macs(kind, name) / CHIPS[chip].macs
        N = tuning.SHAPES[name].N
        row = {
            "kind": kind,
            "shape": name,
            "chip": chip,
            "useful": round(peak / plan.cycles, 4),
            "cycles": plan.cycles,
            "copy_cycles": plan.copy_cycles,
            "blocks": sizes,
            "schedule": asdict(schedules[0]),
        }
        if found[kind, name]:
            cycles, who, tiling = min(found[kind, name], key=lambda item: item[0])
            row |= {
                "rival_useful": round(peak / (N * cycles), 4),
                "ratio": round(N * cycles / plan.cycles, 3),
                "rival": who,
                "rival_tiling": {k: v for k, v in tiling.items() if k not in ("length", "H")},
            }
        rows.append(row)
        print(
            f"{kind:9}{name:16}{chip:7}{row['useful']:6.1%}{row.get('rival_useful', 0):7.1%}"
            f"{row.get('ratio', 0):6.2f}x  {row.get('rival', '')}",
            flush=True,
        )
    return rows


def rival_jobs(work: Iterable[tuple[str, str]], who: str) -> list[tuple[tuple[str, str], Job]]:
    jobs = []
    for kind, name in work:
        shape = tuning.SHAPES[name]
        facts = dict(length=tuning.LENGTH, H=shape.H, window=shape.window)
        facts |= dict(backward=True) if kind == "backward" else {}
        fields, tilings = TILINGS[who, kind, shape.window is not None]
        for tiling in tilings:
            job = Job(f"{SPLASH}:{who}_splash", facts | dict(zip(fields, tiling)), "splash")
            jobs.append(((kind, name), job))
    return jobs


def rival_cycles(item: tuple[str, str], facts: dict, schedules: list[Schedule]) -> int:
    """Of one head. The forward kernel, which a gradient brings along, does not count for it."""
    kind, name = item
    length, q, k = facts["length"], facts["q"], facts["k"]
    whole, edge = visits(tuning.SHAPES[name].window, length, q, k)
    cycles = 0
    for schedule in schedules:
        if ("fwd" in schedule.kernel) != (kind == "forward"):
            continue
        sweeps = length // (k if "dkv" in schedule.kernel else q)
        cycles += schedule.outside + (whole + edge) * (schedule.step + schedule.live)
        cycles += whole * schedule.bodies[0] + edge * schedule.bodies[-1] + sweeps * schedule.edges
    return cycles


def visits(window: int | None, length: int, q: int, k: int) -> tuple[int, int]:
    """Pairs of blocks that see each other wholly, and in part."""
    whole = edge = 0
    for i in range(0, length, q):
        for j in range(0, i + q, k):
            if window and j + k - 1 < i - window + 1:
                continue
            inside = j + k - 1 <= i and (not window or j >= i + q - window)
            whole, edge = whole + inside, edge + (not inside)
    return whole, edge


def check(stored: dict, chips: list[str], kinds: list[str]) -> int:
    """Prints a line for each kernel of ours; 1 if one is planned to be slower than stored, or 0."""
    if versions(sys.executable)["libtpu"] != stored["versions"]["libtpu"]:
        print(f"stored with libtpu {stored['versions']['libtpu']}: another compiler, not compared")
        return 0
    slower = 0
    for chip in chips:
        rows = [r for r in stored["rows"] if r["chip"] == chip and r["kind"] in kinds]
        jobs = [tuning.job(row["kind"], row["shape"], row["blocks"]) for row in rows]
        for row, schedules in zip(rows, planned(chip, jobs)):
            if isinstance(schedules, str):
                sys.exit(f"{row['kind']}, {row['shape']}, {chip}: {schedules}")
            cycles = tuning.cost(
                row["kind"], row["shape"], chip, row["blocks"], schedules[0]
            ).cycles
            bad = cycles > SLACK * row["cycles"]
            slower += bad
            print(
                f"{row['kind']:9}{row['shape']:16}{chip:7}{cycles:>11,} stored {row['cycles']:>11,}"
                + bad * "  SLOWER",
                flush=True,
            )
    return int(slower > 0)


def versions(python: str) -> dict[str, str]:
    names = ("jax", "libtpu", "tokamax")
    code = (
        "import json, platform; from importlib.metadata import distributions; "
        f"found = {{d.name: d.version for d in distributions() if d.name in {names}}}; "
        "print(json.dumps(found | {'python': platform.python_version()}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True).stdout)


if __name__ == "__main__":
    main()
