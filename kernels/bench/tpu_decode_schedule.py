"""Decoding attention on TPU by its schedule: cycles that the compiler plans, beside its copies'.

    pip install -e ".[plan]"
    python kernels/bench/tpu_decode_schedule.py --output kernels/bench/results/NAME.json
    python kernels/bench/tpu_decode_schedule.py --table kernels/bench/results/NAME.json
    python kernels/bench/tpu_decode_schedule.py --check kernels/bench/results/NAME.json

Needs no TPU, and measures none (see `gemma_kernels.compilers.tpu_schedule`). A decoding step has to
read its cache; if the kernel computes in less time than that takes, it can run at the speed of the
memory. Of its loop everything is counted for every grid step, the branches too that a step does not
take. A device with two cores reads by both. `--table` prints what is stored as Markdown; `--check`
compiles the kernel again and fails if it needs 3 % more cycles than stored; where it checks all
rows, it stores the hash of the kernel's source, which a fast test compares.
"""

import argparse
import json
import sys
from math import ceil
from pathlib import Path

import jax
import jax.numpy as jnp

from gemma_kernels.attention import AttentionSpec
from gemma_kernels.compilers.source_hash import DECODING
from gemma_kernels.compilers.tpu_schedule import (
    Job,
    Schedule,
    check,
    comparable,
    described,
    planned,
)
from gemma_kernels.compilers.tpu_targets import CHIPS
from gemma_kernels.decode_attention.tpu import decode_attention_tpu
from gemma_kernels.decode_attention.tpu_blocks import default_blocks

LONG = 32_768
# name -> query heads, key/value heads, head width, window
MODELS = {
    "270M, 1B": (4, 1, 256, 512),
    "E2B, E4B": (8, 2, 256, 512),
    "4B": (8, 4, 256, 1024),
    "12B": (16, 8, 256, 1024),
    "27B": (32, 16, 128, 1024),
}
LOCAL_BYTES = 32 * 2**20  # of a batch of rings: a batch of several steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--models", default=";".join(MODELS), help="names, separated by ';'")
    parser.add_argument("--dtypes", default="bfloat16,int8", help="of the cache")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print stored results")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with stored results")
    args = parser.parse_args()
    if args.table:
        return print_table(json.loads(args.table.read_text())["rows"])
    stored = json.loads(args.check.read_text()) if args.check else None
    if stored and not comparable(stored):
        return
    work = [
        facts(model, local, dtype)
        for dtype in args.dtypes.split(",")
        for model in args.models.split(";")
        for local in (True, False)
    ]
    jobs = [
        Job(f"{__file__}:step", {n: item[n] for n in ("N", "shape", "cache")}, "decode_attention")
        for item in work
    ]
    rows = [
        row(chip, item, schedules)
        for chip in args.chips.split(",")
        for item, schedules in zip(work, planned(chip, jobs))
    ]
    if stored:
        return check(args.check, stored, rows, name, DECODING)
    what = "planned cycles, no TPU; ratio: to the cycles of reading keys and values"
    if args.output:
        args.output.write_text(json.dumps(described(what, DECODING, rows), indent=2) + "\n")


def name(row: dict) -> str:
    """What a row is about."""
    return f"{row['model']} {row['layer']} {row['cache']} {row['chip']}"


def print_table(rows: list[dict]) -> None:
    """A line for each kind of cache, the ratios of all chips side by side."""
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    lines: dict[tuple, dict] = {}
    for row in rows:
        line = lines.setdefault((row["model"], row["layer"], row["cache"]), {})
        line[row["chip"]] = f"{row['ratio']:.2f}"
    print(f"| | {' | '.join(chips)} |", "|---" * (1 + len(chips)) + "|", sep="\n")
    for (model, layer, cache), line in lines.items():
        cells = " | ".join(line.get(chip, "") for chip in chips)
        print(f"| {model} {layer}, {cache} | {cells} |")


def facts(model: str, local: bool, dtype: str) -> dict:
    """A step of all heads of one layer, over a cache `shape = [B, K, S, H]`."""
    N, K, H, window = MODELS[model]
    slots = window if local else LONG
    size = 2 * K * slots * H * jnp.dtype(dtype).itemsize
    batch = max(LOCAL_BYTES // size, 1) if local else 1
    return {
        "model": model,
        "layer": "local" if local else "global",
        "cache": dtype,
        "N": N,
        "shape": [batch, K, slots, H],
        "bytes": batch * size,
    }


def row(chip: str, item: dict, schedules: list[Schedule] | str) -> dict:
    """One line of the table, printed as well."""
    if isinstance(schedules, str):
        sys.exit(f"{item}, {chip}: {schedules}")
    (plan,) = schedules
    B, K, S, H = item["shape"]
    blocks = default_blocks((B, K, S, H), jnp.dtype(item["cache"]).itemsize, CHIPS[chip].cores)
    steps = ceil(B // blocks.rows * (S // blocks.keys) / (blocks.items * blocks.cores))
    each = plan.step + plan.edges + sum(plan.bodies + plan.live + plan.entry)
    cycles = steps * each + plan.outside
    reading = item["bytes"] / CHIPS[chip].bandwidth * CHIPS[chip].clock
    result = {
        "chip": chip,
        **item,
        "steps": steps,
        "cycles": cycles,
        "reading_cycles": round(reading),
        "ratio": round(cycles / reading, 3),
    }
    print(
        f"{item['model']:9} {item['layer']:6} {item['cache']:8} {chip:6} {cycles:7} "
        f"{result['reading_cycles']:7} {result['ratio']:5.2f}",
        flush=True,
    )
    return result


def step(N: int, shape: list[int], cache: str):
    """The kernel and its operands, for `bundles.planned`."""
    B, K, S, H = shape
    shapes = [(B, 1, N, H), (B, K, S, H), (B, K, S, H), (B, 1), (B, 1), (B, S)]
    dtypes = [jnp.bfloat16, cache, cache, jnp.int32, jnp.int32, jnp.int32]
    if cache == "int8":
        shapes, dtypes = shapes + [(B, K, S)] * 2, dtypes + [jnp.float32] * 2

    def run(*operands):
        scales = dict(zip(("k_scale_BKS", "v_scale_BKS"), operands[6:]))
        return decode_attention_tpu(*operands[:6], AttentionSpec(scale=H**-0.5), **scales)

    return run, list(map(jax.ShapeDtypeStruct, shapes, dtypes))


if __name__ == "__main__":
    main()
