"""Times products with tiles on this CPU against XLA's float32 product of the same matrix.

    python kernels/bench/cpu_matmul.py [--rows 1,8,256] [--matrices 270M] [--output FILE]

One process; the ways take turns, and the best turn of each counts: neighbours only ever take time.
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from gemma_kernels.quantized_matmul import QuantizedMatrix, nbytes, quantized_matmul
from gemma_kernels.quantized_matmul.cpu import instructions

MATRICES = {  # outputs and inputs
    "270M": [(640, 2048), (2048, 640), (640, 1024), (262_144, 640)],
    "4B": [(10_240, 2560), (2560, 10_240), (4096, 4096)],
}
ROWS = (1, 4, 8, 16, 256, 1024)
TURNS, SECONDS = 15, 4.0  # of one way with one matrix, at most
HIGHEST = jax.lax.Precision.HIGHEST


# XLA's product in its two orders: which is faster depends on rows and version.
RIVALS = {
    "x @ w.T": lambda x, w: jnp.dot(x, w.T, precision=HIGHEST),
    "w @ x.T": lambda x, w: jax.lax.optimization_barrier(jnp.dot(w, x.T, precision=HIGHEST)).T,
}


def rivals(x, w):
    for name, product in RIVALS.items():
        yield name, jax.jit(product), x, w


def ours(x, tiles, implementation):
    for bits, w in tiles.items():
        for activations in ("float", "int8"):

            def product(x, w, activations=activations):
                return quantized_matmul(
                    x, w, activations=activations, implementation=implementation
                )

            yield f"{bits} bits, {activations}", jax.jit(product), x, w


def best_times(ways):
    """Seconds of the best turn of each way."""
    ways, times = list(ways), {}
    for _, product, x, w in ways:
        product(x, w).block_until_ready()
    began = time.perf_counter()
    for turn in range(TURNS):
        for name, product, x, w in ways:
            start = time.perf_counter()
            product(x, w).block_until_ready()
            times[name] = min(times.get(name, np.inf), time.perf_counter() - start)
        if turn >= 2 and time.perf_counter() - began > SECONDS:
            break
    return times


def tiled(O, I, bits, rng):
    """Random codes with a half scale per 32, as the files of GGUF have."""
    shape = (O // 8, I // 32, bits, 8, 4)
    codes = jnp.asarray(rng.integers(-128, 128, shape, np.int8))
    scale = jnp.asarray(rng.uniform(0.01, 0.02, (O // 8, I // 32, 8)), jnp.float16)
    return QuantizedMatrix(codes, scale, tiled=True)


def measure(matrices, rows, implementation):
    rng = np.random.default_rng(0)
    for O, I in matrices:
        tiles = {bits: tiled(O, I, bits, rng) for bits in (8, 4)}
        wide = jnp.asarray(rng.standard_normal((O, I), np.float32))
        for R in rows:
            if R * O > 2**26:  # results of 256 MB
                continue
            x = jnp.asarray(rng.standard_normal((R, I), np.float32))
            times = best_times([*rivals(x, wide), *ours(x, tiles, implementation)])
            rival = min(times.pop(name) for name in RIVALS)
            for name, seconds in times.items():
                size = nbytes(tiles[int(name[0])])
                yield {
                    "matrix": [O, I],
                    "rows": R,
                    "way": name,
                    "microseconds": round(seconds * 1e6, 1),
                    "GB/s": round(size / seconds / 1e9, 1),
                    "Gop/s": round(2 * R * O * I / seconds / 1e9, 1),
                    "x of float32": round(rival / seconds, 2),
                    "float32 microseconds": round(rival * 1e6, 1),
                }


def table(results):
    ways = list(dict.fromkeys(row["way"] for row in results))
    lines = [f"| matrix, rows | float32 | {' | '.join(ways)} |", "|---" * (len(ways) + 2) + "|"]
    for key in dict.fromkeys((*row["matrix"], row["rows"]) for row in results):
        found = [row for row in results if (*row["matrix"], row["rows"]) == key]
        cells = [f"{found[0]['float32 microseconds']:.0f} µs"]
        for row in found:
            rate = f"{row['GB/s']:.0f} GB/s" if key[2] == 1 else f"{row['Gop/s']:.0f} Gop/s"
            cells.append(f"{row['x of float32']:.2f}x, {rate}")
        lines.append(f"| {key[0]} x {key[1]}, {key[2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--matrices", choices=[*MATRICES, "all"], default="all")
    parser.add_argument(
        "--implementation", default="cpu", help="Or xla: what runs without library."
    )
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    names = MATRICES if args.matrices == "all" else [args.matrices]
    matrices = [matrix for name in names for matrix in MATRICES[name]]
    about = {"jax": jax.__version__, "cores": os.cpu_count(), "load": os.getloadavg()[0]}
    if args.implementation == "cpu":
        about["instructions"] = instructions()
    results = list(measure(matrices, [int(r) for r in args.rows.split(",")], args.implementation))
    print(", ".join(f"{key} {value}" for key, value in about.items()), end="\n\n")
    print(table(results))
    if args.output:
        args.output.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
