"""How long attention on TPU takes by the compiler's plan, and the tiles that make it shortest.

Planned cycles come from libtpu (`gemma_kernels.compilers.tpu_schedule`), so no TPU is needed. The
tiles that `gemma-jax bench kernels --tune` finds stand in `blocks.json`, by chip, kind and shape;
calls of other shapes take those of the nearest one.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

from gemma_kernels.attention import tiles
from gemma_kernels.attention.spec import AttentionSpec
from gemma_kernels.attention.tpu import (
    backward as tpu_backward,
)
from gemma_kernels.attention.tpu import (
    blocks as tpu_blocks,
)
from gemma_kernels.attention.tpu import (
    forward as tpu_forward,
)
from gemma_kernels.compilers.tpu_schedule import Job, Schedule, planned
from gemma_kernels.compilers.tpu_targets import CHIPS

LENGTH = 8192


@dataclass(frozen=True)
class Shape:
    """Query heads, key/value heads, head width, window: what a layer's attention is made of."""

    N: int
    K: int
    H: int
    window: int | None

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(scale=self.H**-0.5, window=self.window)


SHAPES = {
    "270M, 1B local": Shape(4, 1, 256, 512),
    "4B, 12B local": Shape(8, 4, 256, 1024),
    "27B local": Shape(32, 16, 128, 1024),
    "4B, 12B global": Shape(8, 4, 256, None),
    "27B global": Shape(32, 16, 128, None),
}
KINDS = ("forward", "backward")
CANDIDATES = {  # by kind, and whether a window is promised
    ("forward", True): [
        dict(q=q, k=q, piece=piece) for q in (256, 512, 1024) for piece in (128, 256) if piece <= q
    ],
    ("forward", False): [
        dict(q=q, k=k, piece=piece, fetch=8192 // k)
        for q, piece in ((512, 128), (512, 256), (1024, 256))
        for k in (512, 1024)
    ],
    ("backward", True): [
        dict(q=q, piece=128, k=k, part=part)
        for q in (256, 512, 1024)
        for k in (128, 256, 512)
        if k <= q
        for part in ((None, 256) if q > 256 else (None,))
    ],
    ("backward", False): [
        dict(q=512, piece=piece, k=k) for piece in (128, 256, 512) for k in (256, 512)
    ],
}


@dataclass(frozen=True)
class Cost:
    """Of one call on one core: cycles that the compiler plans, and those that its copies take."""

    cycles: int
    copy_cycles: int


def operands(name: str) -> tuple[jax.ShapeDtypeStruct, ...]:
    """q, k, v, lo, hi and positions of a row of `LENGTH` tokens."""
    shape = SHAPES[name]
    q, k = (
        jax.ShapeDtypeStruct((1, LENGTH, heads, shape.H), jnp.bfloat16)
        for heads in (shape.N, shape.K)
    )
    return q, k, k, *(jax.ShapeDtypeStruct((1, LENGTH), jnp.int32),) * 3


def table_blocks(kind: str, name: str, chip: str) -> dict:
    """What the table has for a shape, as far as it fits a call of `LENGTH` tokens."""
    shape = SHAPES[name]
    return tpu_blocks.nearest(kind, chip, shape.N // shape.K, shape.H, shape.window)["blocks"]


def survey(
    chips: Sequence[str], kinds: Sequence[str], names: Sequence[str], tune: bool = False
) -> Iterator[dict]:
    """A row for every chip, kind and shape: tiles, planned cycles, useful share.

    The tiles are those of the table or, to `tune`, the best of those and `CANDIDATES`.
    """
    for chip in chips:
        tries = []
        for kind in kinds:
            for name in names:
                sizes = [table_blocks(kind, name, chip)]
                if tune:
                    more = CANDIDATES[kind, SHAPES[name].window is not None]
                    sizes += [other for other in more if other != sizes[0]]
                tries += [(kind, name, blocks) for blocks in sizes]
        best: dict[tuple[str, str], dict] = {}
        for (kind, name, blocks), schedules in zip(tries, planned(chip, [job(*x) for x in tries])):
            if isinstance(schedules, str):
                if blocks == table_blocks(kind, name, chip):
                    raise RuntimeError(f"{kind}, {name}, {chip}, {blocks}: {schedules}")
                continue  # tiles that do not fit this chip
            row = _row(kind, name, chip, blocks, schedules[0])
            if (kind, name) not in best or row["cycles"] < best[kind, name]["cycles"]:
                best[kind, name] = row
        yield from best.values()


def _row(kind: str, name: str, chip: str, blocks: dict, schedule: Schedule) -> dict:
    price, shape = cost(kind, name, chip, blocks, schedule), SHAPES[name]
    return {
        "chip": chip,
        "kind": kind,
        "shape": name,
        "groups": shape.N // shape.K,
        "width": shape.H,
        "window": shape.window,
        "blocks": blocks,
        "cycles": price.cycles,
        "copy_cycles": price.copy_cycles,
        "useful": round(useful_macs(kind, name) / CHIPS[chip].macs / price.cycles, 4),
    }


def write_table(rows: list[dict], path: Path) -> None:
    """Puts rows into the table at `path`, in place of those of the same chip, kind and shape."""
    names = ("chip", "kind", "groups", "width", "window")
    table = json.loads(path.read_text())["rows"] if path.exists() else []
    merged = {tuple(row[n] for n in names): row for row in table}
    merged |= {
        tuple(row[n] for n in names): {n: row[n] for n in (*names, "blocks")} for row in rows
    }
    lines = ",\n  ".join(json.dumps(row) for row in merged.values())
    head = {"command": "gemma-jax bench kernels --tune", "libtpu": version("libtpu")}
    path.write_text(json.dumps(head)[:-1] + f', "rows": [\n  {lines}\n]}}\n')


def job(kind: str, name: str, blocks: dict) -> Job:
    """The kernel of one shape, for `bundles.planned`."""
    return Job(f"{__name__}:{kind}", {"name": name, "blocks": blocks}, "attention")


def forward(name: str, blocks: dict):
    spec, blocks = SHAPES[name].spec, tpu_forward.Blocks(**blocks)

    def run(*operands):
        out, _ = tpu_forward.attention_forward_tpu(*operands, spec, blocks=blocks, with_lse=False)
        return out

    return run, operands(name)


def backward(name: str, blocks: dict):
    spec, blocks = SHAPES[name].spec, tpu_backward.BackwardBlocks(**blocks)
    q, *rest = operands(name)
    lse = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)

    def run(q, k, v, out, lse, dout, *mask):
        return tpu_backward.attention_backward_tpu(
            q, k, v, out, lse, dout, None, *mask, spec, blocks=blocks
        )

    return run, (q, *rest[:2], q, lse, q, *rest[2:])


def cost(kind: str, name: str, chip: str, blocks: dict, schedule: Schedule) -> Cost:
    """What a kernel costs whose schedule is `schedule`, by how often its parts run."""
    shape = SHAPES[name]
    count = {"forward": _forward_counts, "backward": _backward_counts}[kind]
    counts = count(shape, blocks, operands(name))
    cycles = schedule.outside + counts.steps * schedule.step + counts.sweeps * schedule.edges
    bodies = zip(counts.bodies, schedule.bodies, schedule.live, strict=True)
    cycles += sum(n * (body + live) for n, body, live in bodies)
    cycles += counts.entries * max(schedule.entry) + counts.idle * max(schedule.live)
    facts = CHIPS[chip]
    seconds = counts.copied / facts.bandwidth * facts.cores
    return Cost(cycles, round(seconds * facts.clock))


def useful_macs(kind: str, name: str) -> int:
    """Multiply-accumulates of pairs that see each other: two products, or five of a gradient."""
    shape = SHAPES[name]
    seen = sum(min(t + 1, shape.window or LENGTH) for t in range(LENGTH))
    return {"forward": 2, "backward": 5}[kind] * seen * shape.H * shape.N


@dataclass(frozen=True)
class _Counts:
    """Steps of the grid, sweeps over keys or queries, runs of each body, how often loops over
    bodies are entered, bytes copied, and steps without any body."""

    steps: int
    sweeps: int
    bodies: tuple[int, ...]
    entries: int
    copied: int
    idle: int = 0


def _forward_counts(shape: Shape, blocks: dict, operands: tuple) -> _Counts:
    blocks = tpu_forward.Blocks(**blocks)
    plan = tpu_forward.make_plan(*operands[:2], False, shape.spec, blocks, False)
    rows = -(-LENGTH // blocks.q)
    row_bytes, queries = 2 * shape.H, 2 * shape.N * LENGTH
    if plan.span is not None:
        plain = rows - -(-(shape.window - 1) // blocks.q)
        keys = 2 * shape.K * rows * plan.span
        bodies = (shape.K * plain, shape.K * (rows - plain))
        steps = shape.K * rows
        return _Counts(steps, steps, bodies, 0, row_bytes * (queries + keys))
    some, whole = tiles.static_visible_blocks(
        LENGTH, LENGTH, blocks.q, blocks.k, True, shape.window
    )
    fetched = some.reshape(rows, -1, blocks.fetch).any(2)
    keys = 2 * shape.K * int(fetched.sum()) * blocks.fetch * blocks.k
    bodies = (shape.K * int(whole.sum()), shape.K * int((some & ~whole).sum()))
    sweeps = shape.K * rows
    steps = sweeps * fetched.shape[1]
    return _Counts(steps, sweeps, bodies, steps, row_bytes * (queries + keys))


def _backward_counts(shape: Shape, blocks: dict, operands: tuple) -> _Counts:
    blocks = tpu_backward.BackwardBlocks(**blocks)
    rows, K = -(-LENGTH // blocks.q), shape.K
    copied = 2 * shape.H * LENGTH * (3 * shape.N + 4 * K)
    if shape.window is None:
        some, whole = tiles.static_visible_blocks(LENGTH, LENGTH, blocks.q, blocks.k, True, None)
        copied += 4 * shape.H * LENGTH * (shape.N + 2 * K)  # gradients in float32
        # Of a sweep's start the sums of all blocks of keys are set to 0, in a loop.
        starts = K * max(rows, some.shape[1])
        bodies = (K * int(whole.sum()), K * int((some & ~whole).sum()))
        return _Counts(K * rows, starts, bodies, K * rows, copied)
    before = -(-(shape.window - 1) // blocks.q)
    part = blocks.part or blocks.q
    some, _ = tiles.static_visible_blocks(LENGTH, LENGTH, part, blocks.k, True, shape.window)
    by_part = some[: before * blocks.q // part].sum(1).reshape(before, -1).sum(0)
    bodies = (K * (rows - before), *(K * int(n) for n in by_part))
    # As many steps let the last keys out, without a tile.
    return _Counts(K * (rows + before), K * rows, bodies, K * before, copied, K * before)
