"""A prompt through a Gemma 3n of E4B's depth: beside transformers, and beside an earlier checkout.

    python -m gemma_jax.benchmarks.prefill --torch-python torch-env/bin/python \\
        --before CHECKOUT --output RESULT.json

Random weights, float32, batch 1, on the CPU; 35 layers at a quarter of the width, of which the last
15 share keys and values and compute the last token alone. Seconds from the prompt to the first new
token, and the peak memory of each process. Everybody takes turns, as in `rivals.py`.
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_checkpoints import save_hf
from gemma_jax import Gemma, preset
from gemma_jax.benchmarks import processes
from gemma_jax.benchmarks import speed as benchmark
from gemma_jax.config import GemmaConfig, PerLayerConfig
from gemma_jax.decoder.model import abstract_model
from gemma_jax.weights.tree import map_params

OURS, BEFORE, TORCH = "gemma-jax", "gemma-jax, earlier checkout", "transformers"


def config() -> GemmaConfig:
    """E4B's layers at a quarter of its width, with a small vocabulary and without towers."""
    whole = preset("gemma3n-e4b")
    return replace(
        whole,
        vocab_size=16_384,
        d_model=whole.d_model // 4,
        head_dim=whole.head_dim // 4,
        layers=tuple(replace(spec, d_ff=spec.d_ff // 4) for spec in whole.layers),
        max_positions=4_096,
        laurel_rank=16,
        per_layer=PerLayerConfig(width=64, vocab_size=16_384),
        modality_vocabularies=(),
        vision=None,
        audio=None,
    )


def random_model(cfg: GemmaConfig) -> Gemma:
    """By NumPy: compiling the initialisers of so many layers would take minutes."""
    random = np.random.default_rng(0)

    def fill(param: nnx.Param) -> jax.Array:
        shape, inputs = param.get_value().shape, param.get_metadata().get("inputs")
        if not inputs:
            return jnp.ones(shape)
        spread = math.prod(shape[len(shape) - len(inputs) :]) ** -0.5
        return jnp.asarray(spread * random.standard_normal(shape, np.float32))

    return map_params(abstract_model(cfg), fill)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-python", required=True, help="interpreter that has transformers")
    parser.add_argument("--before", type=Path, help="folder of an earlier checkout of gemma-jax")
    parser.add_argument("--tokens", type=int, default=2_048, help="of the prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    machine, cfg = benchmark.machine_facts(), config()
    ids = np.random.default_rng(0).integers(3, cfg.vocab_size, args.tokens).tolist()
    with ExitStack() as stack:
        hf = stack.enter_context(tempfile.TemporaryDirectory())
        model = random_model(cfg)
        parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
        save_hf(model, hf)
        del model
        python, paths = sys.executable, {"hf": hf, "model": hf}
        named = {OURS: (python, "ours.py", paths), TORCH: (args.torch_python, "hf_torch.py", paths)}
        if args.before:
            before = {"model": hf, "checkout": str(args.before.resolve())}
            named[BEFORE] = (python, "ours.py", before)
        rivals = [
            stack.enter_context(processes.start(name, python, worker, "float32", paths))
            for name, (python, worker, paths) in named.items()
        ]
        for turn in range(-1, args.repeats):  # the first turn compiles
            for rival in rivals:
                seconds = rival.ask("prefill", ids=ids)
                print(f"{turn + 1}/{args.repeats}, {rival.name}: {seconds:.2f} s", file=sys.stderr)
                if turn >= 0:
                    rival.runs.setdefault("prefill", []).append(seconds)
        result = {
            "command": _command(args),
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine,
            "parameters": parameters,
            "rivals": {rival.name: _measured(rival) for rival in rivals},
        }
    _compare(result["rivals"])
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def _measured(rival: processes.Rival) -> dict:
    return {
        "seconds": rival.median("prefill"),
        "runs": rival.runs["prefill"],
        "peak_bytes": rival.peak_bytes(),
        "first_token": rival.results["prefill"],
        "facts": rival.facts,
    }


def _compare(rivals: dict[str, dict]) -> None:
    """Adds how many times as long each took: by medians, and by the median over the turns."""
    ours = rivals[OURS]
    for entry in rivals.values():
        entry["times_as_long"] = entry["seconds"] / ours["seconds"]
        ratios = [theirs / own for theirs, own in zip(entry["runs"], ours["runs"])]
        entry["times_as_long_turn_by_turn"] = statistics.median(ratios)


def _command(args: argparse.Namespace) -> str:
    before = " --before PATH" if args.before else ""
    return (
        f"python -m gemma_jax.benchmarks.prefill --torch-python PATH{before} "
        f"--tokens {args.tokens} --repeats {args.repeats} --cores {args.cores}"
    )


if __name__ == "__main__":
    main()
