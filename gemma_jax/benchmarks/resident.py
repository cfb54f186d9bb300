"""Measures the memory of loading and running Gemma 3n E4B, cut to its first layers.

`python -m gemma_jax.benchmarks.resident make FOLDER` writes a random checkpoint of the real widths,
vocabulary and per-layer width with 5 layers (4 local, 1 global), a few megabytes at a time: 3 GB.
`... run SOURCE --weights int4` loads it with its per-layer table on disk, generates, and prints
what the process held; every figure comes from a process of its own.
"""

import argparse
import json
import resource
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np

from gemma_jax.config import GemmaConfig

LAYERS = 5
PIECE = 1 << 22  # entries that are drawn at one time
CONTEXT = 4_096


def shallow(layers: int = LAYERS) -> GemmaConfig:
    """The decoder of E4B with its first layers alone."""
    from gemma_jax.planning.memory import text_of
    from gemma_jax.presets import preset

    text = text_of(preset("gemma3n-e4b"))
    return replace(text, layers=text.layers[:layers])


def make(folder: Path, layers: int) -> None:
    """Writes a random Hugging Face folder in bfloat16."""
    import ml_dtypes

    from gemma_checkpoints.export import _tensors
    from gemma_checkpoints.hf.config_out import config_to_hf
    from gemma_jax.decoder.model import abstract_model
    from gemma_jax.weights.tree import flat_params

    cfg = shallow(layers)
    model = abstract_model(cfg)
    tensors = _tensors(model, flat_params(model), ml_dtypes.bfloat16, {})
    header, end = {}, 0
    for one in tensors:
        size = 2 * int(np.prod(one.shape))
        place = [end, end + size]
        header[one.name] = {"dtype": "BF16", "shape": list(one.shape), "data_offsets": place}
        end += size
    raw = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_to_hf(cfg) | {"torch_dtype": "bfloat16"}))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        for one in tensors:
            left = int(np.prod(one.shape))
            vector = len(one.shape) == 1
            while left:
                n = min(left, PIECE)
                x = rng.standard_normal(n, np.float32) * 0.02
                file.write((x + vector).astype(ml_dtypes.bfloat16).tobytes())
                left -= n


def run(source: str, weights: str, place: str, dtype: str | None) -> None:
    """Loads, generates 16 tokens, and prints megabytes."""
    import time

    import jax

    import gemma_jax as gj
    from gemma_jax.weights.protocol import array_bytes

    before = resident()
    start = time.perf_counter()
    rules = json.loads(weights) if weights.startswith("{") else weights
    options = dict(weights=rules, per_layer_table=place, dtype=dtype, cache_dtype="bfloat16")
    model = gj.load_model(source, **options)
    jax.block_until_ready(model)
    loaded, peak_load, seconds = resident(), peak(), time.perf_counter() - start
    held = sum(map(array_bytes, jax.tree.leaves(model)))
    session = gj.Session(model, batch=1, max_len=CONTEXT)
    session.prefill([list(range(2, 66))], max_new_tokens=16)
    session.decode(16)
    print(
        json.dumps(
            {
                "source": source,
                "weights": weights,
                "per_layer_table": place,
                "dtype": model.runtime.dtype.name,
                "imported_MB": before / 1e6,
                "weights_MB": held / 1e6,
                "loaded_MB": loaded / 1e6,
                "peak_of_loading_MB": peak_load / 1e6,
                "running_MB": resident() / 1e6,
                "peak_MB": peak() / 1e6,
                "load_seconds": seconds,
            },
            indent=1,
        )
    )


def resident() -> int:
    """Bytes of this process in memory, pages of files too."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """The most that there were."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--layers", type=int, default=LAYERS)
    running = commands.add_parser("run")
    running.add_argument("source")
    running.add_argument("--weights", default="int4", help="A storage, or rules as a JSON object.")
    running.add_argument("--per-layer-table", default="disk")
    running.add_argument("--dtype")
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder, args.layers)
    else:
        run(args.source, args.weights, args.per_layer_table, args.dtype)


if __name__ == "__main__":
    main()
