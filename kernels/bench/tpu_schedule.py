"""Attention on TPU by its schedule: cycles that the compiler plans, beside those of JAX's splash.

    pip install -e ".[plan]"
    python kernels/bench/tpu_schedule.py --output kernels/bench/results/NAME.json

Needs no TPU, and measures none. A TPU core executes one bundle of instructions per cycle, in an
order that its compiler fixes and writes down. Each kernel is compiled in a process of its own, and
its cycles are those of the parts of its body times how often the grid visits them. What counts is
the ratio of two kernels on one chip: waiting for memory is left out on both sides.

To be on the safe side, everything in our kernel that is not a matrix product is counted for every
grid step, and in splash not at all; and of splash the best of several tilings counts.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from math import ceil
from pathlib import Path

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
MACS_PER_CYCLE = {"v5e": 65_536, "v5p": 65_536, "v6e": 262_144, "tpu7x": 262_144}
LENGTH = 8192
# name -> query heads, key/value heads, head width, window
SHAPES = {
    "4B, 12B local": (8, 4, 256, 1024),
    "27B local": (32, 16, 128, 1024),
    "270M, 1B local": (4, 1, 256, 512),
    "3n local": (8, 2, 256, 512),
    "4B global": (8, 4, 256, None),
}
SPLASH = [  # query block, key block, layout of the keys
    (q, k, layout)
    for q, k in ((256, 256), (512, 512), (1024, 512), (512, 1024), (1024, 1024), (2048, 1024))
    for layout in ("HEAD_DIM_MINOR", "SEQ_MINOR")
]
BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z,! ]+)?:")
MARK = re.compile(r"(Start/End empty|Start|End) region (\d+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--shapes", help="names, separated by ';'; default: all")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(compile_here(**json.loads(args.worker))))
        return
    names = args.shapes.split(";") if args.shapes else list(SHAPES)
    rows = [compare(chip, name) for name in names for chip in args.chips.split(",")]
    result = {
        "command": "python " + " ".join(sys.argv),
        "versions": {n: version(n) for n in ("jax", "libtpu")}
        | {"python": platform.python_version()},
        "what": "planned cycles, no TPU; useful: visible keys, share of the matrix unit's peak",
        "length": LENGTH,
        "rows": rows,
    }
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


def compare(chip: str, name: str) -> dict:
    """One line of the table, printed as well."""
    N, K, H, window = SHAPES[name]
    seen = sum(min(t + 1, window or LENGTH) for t in range(LENGTH))
    peak = seen * 2 * H * N / MACS_PER_CYCLE[chip]
    ours = run(chip, kernel="ours", shape=SHAPES[name])
    splash = {}
    for tiling in SPLASH:
        body = run(chip, kernel="splash", shape=SHAPES[name], tiling=tiling)
        if body is not None:
            cycles = body["cycles"][-1] * N * splash_visits(window, *tiling[:2])
            splash[" ".join(map(str, tiling))] = peak / cycles
    best = max(splash, key=splash.get)
    total = our_cycles(ours, N, K, window)
    row = {
        "shape": name,
        "chip": chip,
        "useful": round(peak / total, 4),
        "splash_useful": round(splash[best], 4),
        "ratio": round(peak / total / splash[best], 3),
        "splash_tiling": best,
        "tiling": ours["tiling"],
        "body_cycles": ours["cycles"],
        "step_cycles": ours["other"],
        "cycles": total,
    }
    print(
        f"{name:16} {chip:6} {row['useful']:6.1%} {row['splash_useful']:6.1%} {row['ratio']:5.2f}x"
    )
    sys.stdout.flush()
    return row


def our_cycles(body: dict, N: int, K: int, window: int | None) -> int:
    """Cycles of the whole grid, by how often each of its bodies runs."""
    q, k, heads = body["tiling"]
    tiles, passes = ceil(LENGTH / q), K // heads
    if window is not None:
        plain, by_position = body["cycles"]
        first = ceil((window - 1) / q)  # tiles whose window would begin before the text
        cycles = first * by_position + (tiles - first) * plain + tiles * body["other"]
    else:
        plain, by_position = body["cycles"]
        edges = sum(ceil((i + 1) * q / k) - i * q // k for i in range(tiles))
        inner = sum(i * q // k for i in range(tiles))
        steps = tiles * ceil(LENGTH / k)
        cycles = edges * by_position + inner * plain + (edges + inner) * body["other"]
        cycles += (steps - edges - inner) * SKIPPED
    return passes * cycles


SKIPPED = 250  # cycles of a grid step that does nothing


def splash_visits(window: int | None, q: int, k: int) -> int:
    """Blocks with something to see in them."""
    visits = 0
    for i in range(LENGTH // q):
        oldest = max(0, i * q - window + 1) if window else 0
        visits += ((i + 1) * q - 1) // k - oldest // k + 1
    return visits


def run(chip: str, **what) -> dict | None:
    """Compiles in a process of its own, whose compiler writes down its schedule."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*(packed-bundles-post-ra|pre-delay).*",
        }
        job = json.dumps({"chip": chip, **what})
        command = [sys.executable, __file__, "--worker", job]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            if what["kernel"] == "splash":  # a tiling that does not fit this chip
                return None
            sys.exit(done.stderr[-3000:])
        facts = json.loads(done.stdout.splitlines()[-1])
        return facts | schedule(Path(folder), facts["name"])


def compile_here(chip: str, kernel: str, shape: list, tiling: list | None = None) -> dict:
    """Compiles one kernel for one chip; the name that its schedule goes by."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    N, K, H, window = shape
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip]).devices
    sharding = NamedSharding(Mesh(devices[:1], ("x",)), PartitionSpec())

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    if kernel == "ours":
        from gemma_kernels.attention import AttentionSpec
        from gemma_kernels.attention.tpu import attention_tpu, default_blocks

        spec = AttentionSpec(scale=H**-0.5, window=window)
        q, k = array(1, LENGTH, N, H), array(1, LENGTH, K, H)
        blocks = default_blocks(q.shape, k.shape, spec)
        ints = array(1, LENGTH, dtype=jnp.int32)
        args = (q, k, k, ints, ints, ints)
        facts = {"name": "attention", "tiling": [blocks.q, blocks.k, blocks.heads]}
        function = lambda *args: attention_tpu(*args, spec)  # noqa: E731
    else:
        # Heads of splash are grid steps all alike: one is enough.
        args = (array(1, LENGTH, H), array(1, LENGTH, H), array(1, LENGTH, H))
        function, facts = splash(window, *tiling), {"name": "splash"}
    with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
        jax.jit(function, out_shardings=sharding).lower(*args).compile()
    return facts


def splash(window: int | None, q: int, k: int, layout: str):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (LENGTH, LENGTH)
    mask = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    sizes = kernels.BlockSizes(
        block_q=q, block_kv=k, block_kv_compute=k, k_layout=kernels.QKVLayout[layout]
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask]), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )


def schedule(folder: Path, name: str) -> dict:
    """Cycles of the regions that use the matrix unit, in the order of the code, and of the rest."""
    dumps = {
        kind: next(path for path in folder.glob(f"*{kind}.txt") if name in path.name)
        for kind in ("[0-9]-packed-bundles-post-ra", "hlo-static-per-bundle-utilization")
    }
    bundles, usage = dumps.values()
    used = [
        int(line.split()[0])
        for line in usage.read_text().split("== UTILIZATION:")[1].splitlines()
        if line.strip()
    ]
    cycles, products, open_regions, bundle = Counter(), Counter(), ["-"], 0
    for line in bundles.read_text(errors="replace").splitlines():
        marks = MARK.findall(line)
        open_regions += [region for kind, region in marks if kind == "Start"]
        if BUNDLE.match(line):
            cycles[open_regions[-1]] += 1
            products[open_regions[-1]] += used[bundle] if bundle < len(used) else 0
            bundle += 1
        for kind, region in marks:
            if kind == "End" and region in open_regions:
                open_regions.remove(region)
    bodies = sorted((r for r in products if products[r]), key=int)
    bodies = sorted(sorted(bodies, key=lambda r: cycles[r])[-2:], key=int)
    return {
        "cycles": [cycles[region] for region in bodies],
        "other": sum(cycles.values()) - sum(cycles[region] for region in bodies),
    }


if __name__ == "__main__":
    main()
