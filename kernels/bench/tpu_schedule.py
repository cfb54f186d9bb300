"""Attention on TPU by its plan: cycles that the compiler schedules, beside splash attention.

    pip install -e ".[plan]"
    python kernels/bench/tpu_schedule.py --tokamax-python PATH \
        --output kernels/bench/results/tpu-schedule.json
    python kernels/bench/tpu_schedule.py --check kernels/bench/results/tpu-schedule.json
    python kernels/bench/tpu_schedule.py --table kernels/bench/results/tpu-schedule.json

Needs no TPU, and measures none: see `gemma_kernels.compilers.tpu_schedule` for what a plan is. What
counts is the ratio of two kernels on one chip; waiting for memory is left out on both sides, and
for ours the time of its copies at the chip's bandwidth stands beside its cycles. Rivals are splash
attention of JAX and, with `--tokamax-python` (an interpreter of an environment that has tokamax and
libtpu), that of tokamax; of each the best of several tilings counts.

Cycles of a kernel, ours or theirs: its bodies as often as the grid runs them, what surrounds them
once per step, starts and ends of sweeps once per sweep.

Each row is written as soon as it is known, in place of the stored one of its chip, kind and shape;
others stay, if the same compiler made them. `--keep-rivals` tries of rivals no tiling but the one
that is stored as the best.

`--check` compiles our kernels again and fails if one needs 3 % more cycles than stored; where it
checks all of them, it stores the hash of their source, which a fast test compares. `--table`
prints what is stored as the table of `kernels/README.md`.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from gemma_kernels.attention.tpu import tuning
from gemma_kernels.compilers.source_hash import ATTENTION, source_hash
from gemma_kernels.compilers.tpu_schedule import Job, Schedule, comparable, is_slower, planned
from gemma_kernels.compilers.tpu_targets import CHIPS

SPLASH = str(Path(__file__).with_name("workers") / "splash.py")

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
    parser.add_argument("--limit", type=float, default=600, help="seconds for one compilation")
    parser.add_argument("--keep-rivals", action="store_true", help="their stored tilings alone")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with stored results")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print stored results")
    args = parser.parse_args()
    chips, kinds = args.chips.split(","), args.kinds.split(",")
    names = args.shapes.split(";") if args.shapes else list(tuning.SHAPES)
    work = [(kind, name) for kind in kinds for name in names]
    if args.table:
        return print_table(json.loads(args.table.read_text())["rows"], chips)
    if args.check:
        stored = json.loads(args.check.read_text())
        if code := check(stored, chips, work):
            sys.exit(code)
        if comparable(stored) and len(chips) * len(work) == len(CHIPS) * 2 * len(tuning.SHAPES):
            stored["sources"] = source_hash(ATTENTION)
            args.check.write_text(json.dumps(stored, indent=1) + "\n")
        return None
    store = Store(args.output, args.tokamax_python)
    for chip in chips:
        for row in compare(chip, work, args.tokamax_python, args.limit, args.keep_rivals, store):
            store.add(row)


class Store:
    """Rows by chip, kind and shape, in a file (or none) that is whole after each of them."""

    def __init__(self, path: Path | None, tokamax_python: str | None):
        self.path, self.rows = path, {}
        found = versions(sys.executable)
        stored = json.loads(path.read_text()) if path and path.exists() else {}
        if tokamax_python:
            found["tokamax's environment"] = versions(tokamax_python)
        elif inherited := stored.get("versions", {}).get("tokamax's environment"):
            found["tokamax's environment"] = inherited
        if stored and found != stored["versions"]:
            sys.exit(f"{path} holds rows of {stored['versions']}, not {found}: choose another file")
        self.head = {
            "command": "python kernels/bench/tpu_schedule.py --tokamax-python PATH --output FILE",
            "versions": found,
            "what": "planned cycles, no TPU; useful: visible keys, share of the matrix unit's peak",
            "length": tuning.LENGTH,
            "sources": source_hash(ATTENTION),
        }
        for row in stored.get("rows", ()):
            self.rows[self.key(row)] = row

    @staticmethod
    def key(row: dict) -> tuple[str, str, str]:
        return row["chip"], row["kind"], row["shape"]

    def tilings(self, chip: str) -> dict[tuple[str, str], list]:
        """By kind and shape, the stored best rival and its tiling."""
        rows = [row for row in self.rows.values() if row["chip"] == chip and "rival" in row]
        return {self.key(row)[1:]: [(row["rival"], row["rival_tiling"])] for row in rows}

    def add(self, row: dict) -> None:
        self.rows[self.key(row)] = row
        places = [list(CHIPS), list(tuning.KINDS), list(tuning.SHAPES)]

        def order(key):
            return [names.index(name) for names, name in zip(places, key)]

        rows = [self.rows[key] for key in sorted(self.rows, key=order)]
        if self.path:
            self.path.write_text(json.dumps(self.head | {"rows": rows}, indent=1) + "\n")


def compare(
    chip: str,
    work: list[tuple[str, str]],
    tokamax_python: str | None,
    limit: float,
    keep_rivals: bool,
    store: Store,
) -> Iterator[dict]:
    """Rows of the table, printed as well."""
    blocks = [tuning.table_blocks(kind, name, chip) for kind, name in work]
    jobs = [tuning.job(kind, name, sizes) for (kind, name), sizes in zip(work, blocks)]
    ours = planned(chip, jobs, limit=limit)
    pythons = {"jax": sys.executable} | ({"tokamax": tokamax_python} if tokamax_python else {})
    kept = store.tilings(chip) if keep_rivals else None
    rivals = {who: [rival_jobs(item, who, kept) for item in work] for who in pythons}
    plans = {  # asked for job by job: then each row is complete before the next begins
        who: planned(chip, [job for jobs in rivals[who] for job in jobs], python, limit)
        for who, python in pythons.items()
    }
    for n, ((kind, name), sizes, schedules) in enumerate(zip(work, blocks, ours)):
        found = []
        for who in pythons:
            for job in rivals[who][n]:
                plan = next(plans[who])
                if not isinstance(plan, str):  # a tiling that does not fit this chip
                    found.append((rival_cycles(work[n], job.args, plan), who, job.args))
        if isinstance(schedules, str):
            print(f"{kind}, {name}, {chip}: {schedules}", flush=True)
            continue
        plan = tuning.cost(kind, name, chip, sizes, schedules[0])
        peak = tuning.useful_macs(kind, name) / CHIPS[chip].macs
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
        if found:
            cycles, who, facts = min(found, key=lambda rival: rival[0])
            cycles *= tuning.SHAPES[name].N
            tiling = {name: facts[name] for name in TOKAMAX if name in facts}
            row["ratio"] = round(cycles / plan.cycles, 3)
            row |= {"rival": who, "rival_tiling": tiling, "rival_cycles": cycles}
            row["rival_useful"] = round(peak / cycles, 4)
        print(
            f"{kind:9}{name:16}{chip:7}{row['useful']:6.1%}{row.get('rival_useful', 0):7.1%}"
            f"{row.get('ratio', 0):6.2f}x  {row.get('rival', '')}",
            flush=True,
        )
        yield row


def print_table(rows: list[dict], chips: list[str]) -> None:
    """In Markdown, a line for each kind and shape."""
    titles = {"forward": "forward", "backward": "gradient"}
    found = {Store.key(row): f"{row['useful']:.0%}, {row['ratio']:.2f}x" for row in rows}
    print(f"| | {' | '.join(chips)} |", "|---" * (1 + len(chips)) + "|", sep="\n")
    for kind in tuning.KINDS:
        for name in tuning.SHAPES:
            cells = [found.get((chip, kind, name), "").replace("%", " %") for chip in chips]
            print(f"| {titles[kind]}, {name} | {' | '.join(cells)} |")


def rival_jobs(item: tuple[str, str], who: str, kept: dict | None) -> list[Job]:
    """A job for each tiling, or for the one that is kept of this item if it is by `who`."""
    kind, name = item
    shape = tuning.SHAPES[name]
    facts = dict(length=tuning.LENGTH, H=shape.H, window=shape.window)
    facts |= dict(backward=True) if kind == "backward" else {}
    fields, sizes = TILINGS[who, kind, shape.window is not None]
    tilings = [dict(zip(fields, values)) for values in sizes]
    if kept is not None:
        tilings = [tiling for rival, tiling in kept.get(item, ()) if rival == who]
    return [Job(f"{SPLASH}:{who}_splash", facts | tiling, "splash") for tiling in tilings]


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
        cycles += schedule.outside + (whole + edge) * schedule.step + sweeps * schedule.edges
        for count, n in ((whole, 0), (edge, -1)):
            cycles += count * (schedule.bodies[n] + schedule.live[n] + schedule.entry[n])
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


def check(stored: dict, chips: list[str], work: list[tuple[str, str]]) -> int:
    """Prints a line for each kernel of ours; 1 if one is planned to be slower than stored, or 0."""
    if not comparable(stored):
        return 0
    slower = 0
    for chip in chips:
        rows = [row for row in stored["rows"] if Store.key(row)[1:] in work and row["chip"] == chip]
        jobs = [tuning.job(row["kind"], row["shape"], row["blocks"]) for row in rows]
        for row, schedules in zip(rows, planned(chip, jobs)):
            if isinstance(schedules, str):
                sys.exit(f"{row['kind']}, {row['shape']}, {chip}: {schedules}")
            plan = tuning.cost(row["kind"], row["shape"], chip, row["blocks"], schedules[0])
            name = f"{row['kind']:9}{row['shape']:16}{chip}"
            slower += is_slower(name, plan.cycles, row["cycles"])
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
