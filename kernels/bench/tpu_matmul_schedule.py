"""Quantised products on TPU by their schedules: cycles that the compiler plans.

    pip install -e ".[plan]"
    python kernels/bench/tpu_matmul_schedule.py --output kernels/bench/results/NAME.json
    python kernels/bench/tpu_matmul_schedule.py --table kernels/bench/results/NAME.json
    python kernels/bench/tpu_matmul_schedule.py --check kernels/bench/results/NAME.json

Needs no TPU, and measures none (see `gemma_kernels.compilers.tpu_schedule`). With few rows of
activations a product has to read its codes and scales, with many to multiply: cycles are compared
with those of reading, and with those that the matrix units need at their peak, in bfloat16. For
many rows the same kernel with a matrix of bfloat16 numbers is planned as well. `--table` prints
what is stored as Markdown, layers as sums over their matrices; `--check` compiles again and fails
if a product needs 3 % more cycles than stored; where it checks all rows, it stores the hash of the
kernels' source, which a fast test compares.

Local letters: R rows; I inputs; O outputs; E groups of inputs.
"""

import argparse
import json
import sys
from functools import partial
from math import ceil
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_kernels.compilers.source_hash import QUANTIZED
from gemma_kernels.compilers.tpu_schedule import (
    Job,
    Schedule,
    check,
    comparable,
    described,
    planned,
)
from gemma_kernels.compilers.tpu_targets import CHIPS
from gemma_kernels.quantized_matmul.form import QuantizedMatrix
from gemma_kernels.quantized_matmul.tpu import FEW, quantized_matmul_tpu
from gemma_kernels.quantized_matmul.tpu_factors import VMEM
from gemma_kernels.quantized_matmul.tpu_sums import default_outputs
from gemma_kernels.quantized_matmul.tpu_widen import PIECE, Blocks, default_blocks

# name -> width, width of queries, of keys, of the feed-forward layer
MODELS = {
    "270M": (640, 1024, 256, 2048),
    "1B": (1152, 1024, 256, 6912),
    "4B": (2560, 2048, 1024, 10240),
    "12B": (3840, 4096, 2048, 15360),
    "27B": (5376, 4096, 2048, 21504),
    "E2B": (2048, 2048, 512, 8192),
    "E4B": (2048, 2048, 512, 16384),
}
COPIES = 150  # bundles that may start copies
MXU = {"v5e": 128, "v5p": 128, "v6e": 256, "tpu7x": 256}  # inputs of a pass of its matrix unit
ALL = tuple(MODELS)
# rows, codes, inputs with one scale, models
KINDS = (
    (1, "int4", 32, ALL),
    (1, "int8", 32, ("4B",)),
    (1, "int8", None, ("4B",)),
    (8, "int4", 32, ("4B", "27B")),
    (8, "int8", 32, ("4B",)),
    (64, "int4", 32, ("4B",)),
    (512, "int4", 32, ("4B", "27B")),
    (512, "int8", 32, ("4B",)),
)


WHAT = (
    "planned cycles, no TPU; beside those of reading the matrix, and of multiplying in bfloat16 at "
    "the peak of the matrix units"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rows", default=",".join(sorted({str(kind[0]) for kind in KINDS})))
    parser.add_argument("--keep", action="store_true", help="what --output has of others")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print stored results")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with stored results")
    args = parser.parse_args()
    if args.table:
        return print_table(json.loads(args.table.read_text())["rows"])
    stored = json.loads(args.check.read_text()) if args.check else None
    if stored and not comparable(stored):
        return
    rows = []
    kept = json.loads(args.output.read_text())["rows"] if args.output and args.keep else []
    for chip in args.chips.split(","):
        work = products(args.models.split(","), set(map(int, args.rows.split(","))))
        jobs = [Job(f"{__file__}:step", dict(item["job"], chip=chip), "quantized") for item in work]
        for item, schedules in zip(work, planned(chip, jobs)):
            rows.append(row(chip, item, schedules))
            if args.output:
                made = {name(row) for row in rows}
                others = [row for row in kept if name(row) not in made]
                args.output.write_text(
                    json.dumps(described(WHAT, QUANTIZED, others + rows), indent=2) + "\n"
                )
    if stored:
        check(args.check, stored, rows, name, QUANTIZED)


def products(models: list[str], rows: set[int]) -> list[dict]:
    """Matrices of a layer, each once, with how many of it there are."""
    found = []
    for R, codes, group, of in KINDS:
        for model in of if R in rows else ():
            D, Q, K, F = MODELS[model]
            shapes = {"q": (D, Q, 1), "k, v": (D, K, 2), "o": (Q, D, 1)}
            shapes |= {"gate, up": (D, F, 2), "down": (F, D, 1)}
            if R > FEW:  # those that take the time
                shapes = {name: shapes[name] for name in ("gate, up", "down")}
            wide = ("bfloat16",) if R > 64 and codes == "int4" else ()
            for name, (I, O, count) in shapes.items():
                for kind in (codes, *wide) if model in models else ():
                    job = dict(R=R, I=I, O=O, codes=kind, group=group or I)
                    found.append(dict(model=model, matrix=name, count=count, job=job))
    return found


def name(row: dict) -> str:
    """What a row is about."""
    return " ".join(str(row[n]) for n in ("chip", "model", "matrix", "R", "codes", "group"))


def print_table(rows: list[dict]) -> None:
    """A line for each kind of product and model, all matrices of a layer together."""
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    sums: dict[tuple, dict] = {}
    for row in rows:
        kind = (row["R"], row["codes"], row["group"] if row["group"] != row["I"] else None)
        cell = sums.setdefault((*kind, row["model"]), {}).setdefault(row["chip"], [0, 0, 0])
        for n, figure in enumerate(("cycles", "reading_cycles", "multiplying_cycles")):
            cell[n] += row["count"] * row[figure]
    print(f"| | {' | '.join(chips)} |", "|---" * (1 + len(chips)) + "|", sep="\n")
    for (R, codes, group, model), line in sums.items():
        if codes == "bfloat16":
            continue
        cells = []
        for chip in chips:
            cycles, reading, multiplying = line[chip]
            text = f"{cycles / (reading if R <= 64 else multiplying):.2f}"
            if plain := sums.get((R, "bfloat16", group, model)):
                text += f", {cycles / plain[chip][0]:.2f}x"
            cells.append(text)
        size = "" if R == 1 else "s"
        kind = f"{codes}, {'per channel' if group is None else f'groups of {group}'}"
        print(f"| {R} row{size}, {kind}, {model} | {' | '.join(cells)} |")


def cut(chip: str, R: int, I: int, O: int, codes: str) -> tuple[Blocks | None, int]:
    """Blocks of many rows, and outputs of a step."""
    bits, mxu, cores = 8 if codes == "int8" else 4, MXU[chip], CHIPS[chip].cores
    if R <= FEW:
        return None, default_outputs(I, O, bits, mxu, cores)
    blocks = default_blocks(R, I, O, bits, mxu, cores)
    return blocks, blocks.outputs


def row(chip: str, item: dict, schedules: list[Schedule] | str) -> dict:
    """One stored line, printed as well."""
    if isinstance(schedules, str):
        sys.exit(f"{item}, {chip}: {schedules}")
    (plan,), job, figures = schedules, item["job"], CHIPS[chip]
    R, I, O = job["R"], job["I"], job["O"]
    blocks, outputs = cut(chip, R, I, O, job["codes"])
    sweeps = ceil(ceil(O / outputs) / figures.cores) * (ceil(R / blocks.rows) if blocks else 1)
    steps = sweeps * (I // blocks.inputs if blocks else 1)
    # Some conditional parts run in every step; those that are longer at an end of a sweep.
    always = min(plan.edges, COPIES)
    cycles = steps * (plan.step + always + sum(plan.bodies + plan.live + plan.entry))
    cycles += sweeps * (plan.edges - always)
    bits = {"int8": 8, "int4": 4, "bfloat16": 16}[job["codes"]]
    size = I * O * bits / 8 + (2 * I // job["group"] * O if bits < 16 else 0)
    reading = size / figures.bandwidth * figures.clock
    found = {
        "chip": chip,
        "model": item["model"],
        "matrix": item["matrix"],
        "count": item["count"],
        **job,
        "steps": steps,
        "cycles": cycles + plan.outside,
        "reading_cycles": round(reading),
        "multiplying_cycles": round(R * I * O / figures.macs / figures.cores),
        "ratio": round((cycles + plan.outside) / reading, 3),
        "spills": plan.spills,
    }
    print(
        f"{chip:6} {item['model']:5} {item['matrix']:9} {R:5} {I:6} {O:6} {job['codes']:9} "
        f"{found['cycles']:8} {found['reading_cycles']:7} {found['multiplying_cycles']:7} "
        f"{found['ratio']:6.2f}",
        flush=True,
    )
    return found


def step(R: int, I: int, O: int, codes: str, group: int, chip: str):
    """The kernel and its operands, for `tpu_schedule.planned`."""
    blocks, _ = cut(chip, R, I, O, codes)
    arrays = {"x": ((R, I), "bfloat16"), "codes": ((I, O), codes)}
    if codes != "bfloat16":
        arrays["scale"] = ((I // group, O), "int16")
        run = _quantized
    else:
        run = partial(_plain, blocks)
    return run, [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in arrays.values()]


def _quantized(x_RI, codes_IO, scale_EO):
    return quantized_matmul_tpu(x_RI, QuantizedMatrix(codes_IO, scale_EO, columns=True))


def _plain(blocks: Blocks, x_RI, w_IO):
    """The product of bfloat16 numbers, by a kernel that is cut alike."""
    (R, I), O = x_RI.shape, w_IO.shape[1]
    rows, inputs, outputs = blocks.rows, blocks.inputs, blocks.outputs

    def kernel(x_ref, w_ref, out_ref, sums_ref):
        k = pl.program_id(2)
        for first in range(0, outputs, PIECE):
            chunk = pl.ds(first, PIECE)
            y_RO = lax.dot(x_ref[...], w_ref[:, chunk], preferred_element_type=jnp.float32)
            sums_ref[:, chunk] = jnp.where(k == 0, 0.0, sums_ref[:, chunk]) + y_RO

        @pl.when(k == pl.num_programs(2) - 1)
        def _():
            out_ref[...] = sums_ref[...].astype(out_ref.dtype)

    return pl.pallas_call(
        kernel,
        grid=(R // rows, pl.cdiv(O, outputs), I // inputs),
        in_specs=[
            pl.BlockSpec((rows, inputs), lambda r, o, k: (r, k)),
            pl.BlockSpec((inputs, outputs), lambda r, o, k: (k, o)),
        ],
        out_specs=pl.BlockSpec((rows, outputs), lambda r, o, k: (r, o)),
        scratch_shapes=[pltpu.VMEM((rows, outputs), jnp.float32)],
        out_shape=jax.ShapeDtypeStruct((R, O), jnp.bfloat16),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        name="quantized_matmul_plain",
    )(x_RI, w_IO)


if __name__ == "__main__":
    main()
