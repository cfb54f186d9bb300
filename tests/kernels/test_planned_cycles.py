"""Plans of the TPU's compiler: how they are read, the table of tiles, and that none gets longer."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from gemma_kernels.attention.tpu import blocks as tpu_blocks
from gemma_kernels.attention.tpu import tuning
from gemma_kernels.compilers.source_hash import ATTENTION, DECODING, QUANTIZED, source_hash
from gemma_kernels.compilers.tpu_schedule import Job, Schedule, planned, read_schedules
from gemma_kernels.compilers.tpu_targets import CHIPS

ROOT = Path(__file__).parents[2]
STORED = ROOT / "kernels" / "bench" / "results" / "tpu-schedule.json"
STORED_DECODING = STORED.with_name("tpu-decode-schedule.json")
STORED_QUANTIZED = STORED.with_name("tpu-matmul-schedule.json")

BUNDLES = """\
= control target key start
LB: loop body
     0   :  { outside }
   0x1 LB: > { every step }
   0x2   : > { %1 = sbr.rel (%p1) target bundleno = 9 (0x9), region = 5  ;;  every step }
   0x3   : > { around the body }
   0x4   : > { %2 = sbr.rel (%p2) target bundleno = 7 (0x7), region = 6 }
   0x5   : > { body }
   0x6   :  {}
   0x7 LB: > > { a loop inside }
   0x8   : > > { %3 = sbr.rel (!%p3) target bundleno = 7 (0x7), region = 7 }
   0x9   : > { %4 = sbr.rel (%p4) target bundleno = 11 (0xb), region = 8 }
   0xa   : > { an edge }
   0xb   : > { %5 = sbr.rel (!%p5) target bundleno = 1 (0x1), region = 9 }
   0xc   :  { outside }
"""
USE = """\
== CAPACTIY:
MATMUL, VSTORE:SPILL
    4     1
== UTILIZATION:
""" + "\n".join(
    f"{int(bundle in (5, 7))} {int(bundle == 6)}" for bundle in range(13)
)  # fmt: skip


def test_a_plan_by_hand(tmp_path):
    (tmp_path / "17-my_kernel.1-01-packed-bundles-post-ra.txt").write_text(BUNDLES)
    (tmp_path / "17-my_kernel.1-00-schedule-analysis_packed-bundles-post-ra.txt").write_text("")
    use = tmp_path / "17-my_kernel.1-02-pre-delay_hlo-static-per-bundle-utilization.txt"
    use.write_text(USE)
    assert read_schedules(tmp_path, "kernel") == [
        Schedule(
            kernel="my_kernel", outside=2, step=4, bodies=[2, 2], live=[2, 0], entry=[0, 2],
            edges=1, spills=1,
        )
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no schedule of a kernel called 'other'"):
        read_schedules(tmp_path, "other")


def test_a_job_without_an_end_takes_its_limit_and_no_other_job(tmp_path):
    worker = tmp_path / "worker"
    answer = '{"error": "refused"}'
    worker.write_text(
        f"#!/bin/sh\nwhile read line; do case $line in *slow*) exec sleep 60;; esac;"
        f" echo '{answer}'; done\n"
    )
    worker.chmod(0o755)
    jobs = [Job(f"module:{name}", {}, "kernel") for name in ("quick", "slow", "quick")]
    first, late, last = planned("v5e", jobs, str(worker), limit=2)
    assert first == last == "refused"
    assert late == "its compiler ended, or took more than 2 seconds"
    with pytest.raises(RuntimeError, match="ended while it compiled"):
        list(planned("v5e", jobs[:1], "/bin/true"))


def test_the_table_has_tiles_for_every_chip_and_kind():
    for chip in CHIPS:
        for kind in tuning.KINDS:
            for name, shape in tuning.SHAPES.items():
                row = tpu_blocks.nearest(kind, chip, shape.N // shape.K, shape.H, shape.window)
                found = row["groups"], row["width"], row["window"]
                assert found == (shape.N // shape.K, shape.H, shape.window), name


def test_other_shapes_take_the_nearest_row():
    row = tpu_blocks.nearest("forward", "v5e", groups=3, width=240, window=700)
    assert (row["groups"], row["width"], row["window"]) == (4, 256, 512)
    row = tpu_blocks.nearest("backward", "v6e", groups=1, width=72, window=None)
    assert (row["groups"], row["width"], row["window"]) == (2, 128, None)


def test_a_stored_row_is_replaced_and_others_stay(tmp_path):
    table = tmp_path / "table.json"
    row = dict(chip="v5e", kind="forward", groups=2, width=128, window=None)
    other = row | dict(chip="v6e", blocks={"q": 128})
    pytest.importorskip("libtpu", reason="its version is written down: gemma-jax[plan]")
    tuning.write_table([row | dict(blocks={"q": 256}), other], table)
    tuning.write_table([row | dict(blocks={"q": 512}, cycles=1)], table)
    assert json.loads(table.read_text())["rows"] == [row | dict(blocks={"q": 512}), other]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "chip, kinds, shape",
    [
        ("tpu7x", "forward", "27B local"),
        ("v6e", "forward", "270M, 1B local"),
        ("v5e", "forward,backward", "270M, 1B local"),
    ],
)
def test_no_kernel_is_planned_to_be_slower_than_stored(chip, kinds, shape):
    """Those that compile within seconds; the rest is compared by hand, with the bench."""
    options = ["--chips", chip, "--kinds", kinds, "--shapes", shape]
    assert checked("tpu_schedule.py", STORED, *options) == len(kinds.split(","))


@pytest.mark.nightly
@pytest.mark.parametrize("chip, dtypes", [("v5p", "int8"), ("tpu7x", "bfloat16,int8")])
def test_no_decoding_step_is_planned_to_be_slower_than_stored(chip, dtypes):
    options = ["--chips", chip, "--models", "4B", "--dtypes", dtypes]
    compared = checked("tpu_decode_schedule.py", STORED_DECODING, *options)
    assert compared == 2 * len(dtypes.split(","))


@pytest.mark.nightly
@pytest.mark.parametrize("chip, rows, products", [("v5p", "1", 15), ("tpu7x", "1,8", 25)])
def test_no_quantised_product_is_planned_to_be_slower_than_stored(chip, rows, products):
    options = ["--chips", chip, "--models", "4B", "--rows", rows]
    assert checked("tpu_matmul_schedule.py", STORED_QUANTIZED, *options) == products


def checked(bench, stored, *options) -> int:
    """How many kernels the bench compares with what is stored, none of them slower."""
    pytest.importorskip("libtpu", reason="the compiler comes with the plan extra: gemma-jax[plan]")
    command = [sys.executable, ROOT / "kernels" / "bench" / bench, "--check", stored, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    if "not compared" in done.stdout:
        pytest.skip(done.stdout.strip())
    return done.stdout.count("stored")


@pytest.mark.parametrize(
    "bench, stored, files",
    [
        ("tpu_schedule", STORED, ATTENTION),
        ("tpu_decode_schedule", STORED_DECODING, DECODING),
        ("tpu_matmul_schedule", STORED_QUANTIZED, QUANTIZED),
    ],
)
def test_the_kernels_are_those_whose_schedules_are_stored(bench, stored, files):
    """Compiling all of them takes an hour; by day it is enough that their code is the same.

    After a change to them, look whether they are as fast as they were. The command stores the hash
    of what it found good:

        python kernels/bench/tpu_schedule.py --check kernels/bench/results/tpu-schedule.json

    Where it says that a kernel got slower on purpose, measure again with `--output` in its place.
    """
    refresh = f"run: python kernels/bench/{bench}.py --check {stored.relative_to(ROOT)}"
    assert json.loads(stored.read_text())["sources"] == source_hash(files), refresh


def test_the_hash_of_source_sees_code_and_nothing_else(tmp_path):
    file = tmp_path / "kernel.py"

    def hashed(text):
        file.write_text(text)
        return source_hash([file])

    plain = hashed("def f(x):\n    return x + 1\n")
    assert hashed('import jax\ndef f(x):\n    """Adds."""\n    return (x\n  + 1)  # one\n') == plain
    assert hashed("def f(x):\n    return x + 2\n") != plain


def test_the_stored_tables_meet_what_is_promised():
    """Ratios to the best splash attention, and of decoding to reading, as the README has them."""
    rows = json.loads(STORED.read_text())["rows"]
    stored = {(row["chip"], row["kind"], row["shape"]) for row in rows}
    local = [name for name, shape in tuning.SHAPES.items() if shape.window is not None]
    assert stored >= set(itertools.product(CHIPS, tuning.KINDS, local))
    for row in rows:
        window = tuning.SHAPES[row["shape"]].window
        at_least = {
            ("forward", 512): 1.6,
            ("forward", 1024): 1.25 if row["chip"] == "tpu7x" else 1.35,
            ("forward", None): 0.95,
            ("backward", None): 0.95,
        }.get((row["kind"], window), 1.4)
        assert row["ratio"] >= at_least, row
        assert row["copy_cycles"] < row["cycles"]
    decoding = json.loads(STORED_DECODING.read_text())["rows"]
    assert {row["chip"] for row in decoding} == set(CHIPS)
    for row in decoding:
        # A tpu7x multiplies no int8 numbers: widening the cache takes longer than reading it.
        widened = row["cache"] == "int8" and row["chip"] == "tpu7x"
        assert row["ratio"] <= (1.5 if widened else 0.7), row


def test_quantised_products_are_planned_as_promised():
    """Layers beside the time of reading them, and many rows beside a matrix in bfloat16."""
    sums: dict[tuple, list[int]] = {}
    for row in json.loads(STORED_QUANTIZED.read_text())["rows"]:
        key = row["chip"], row["model"], row["R"], row["codes"], row["group"] == row["I"]
        total = sums.setdefault(key, [0, 0])
        for n, figure in enumerate(("cycles", "reading_cycles")):
            total[n] += row["count"] * row[figure]
    assert {chip for chip, *_ in sums} == set(CHIPS)
    for (chip, model, R, codes, channels), (cycles, reading) in sums.items():
        if R <= 8 and model != "270M":  # whose matrices are read sooner than a kernel starts
            assert cycles <= 1.2 * reading, (chip, model, R, codes)
        if R == 512 and codes != "bfloat16":
            plain, _ = sums[chip, model, R, "bfloat16", channels]
            assert cycles <= 1.2 * plain, (chip, model, codes)
