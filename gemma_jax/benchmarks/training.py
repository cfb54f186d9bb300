"""A step of training of Gemma 3 270M: beside transformers with torch's AdamW, and PEFT.

    python -m gemma_jax.benchmarks.training --torch-python torch-env/bin/python --output RESULT.json

Float32 on the CPU, AdamW, gradients clipped at a norm of 1; seconds of a step on one row, and the
peak memory of each process, weights and moments included. Everybody takes turns, as in `rivals.py`;
the two that train all parameters are gone before those with adapters are there.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import numpy as np

from gemma_checkpoints import load_weights, resolve, save_hf
from gemma_jax.benchmarks import processes
from gemma_jax.benchmarks import speed as benchmark

OURS, TORCH = "gemma-jax", "transformers"
VARIANTS = ("full", "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-python", required=True, help="interpreter with transformers, peft")
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    with tempfile.TemporaryDirectory() as folder:
        hf = f"{folder}/hf"
        source = resolve(args.model)
        save_hf(load_weights(source, dtype="float32"), hf, source=source)
        result = {
            "command": _command(args),
            "date": time.strftime("%Y-%m-%d"),
            "machine": benchmark.machine_facts(),
            "variants": {name: _measured(args, name, hf) for name in VARIANTS},
        }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def _measured(args: argparse.Namespace, variant: str, hf: str) -> dict:
    """What each of the two needs, and how many times as much the other does."""
    ids = np.random.default_rng(0).integers(3, 100_000, (1, args.tokens)).tolist()
    paths = {"hf": hf, "model": hf, "cores": str(args.cores)}
    workers = {
        OURS: (sys.executable, "training_ours.py"),
        TORCH: (args.torch_python, "training_torch.py"),
    }
    with ExitStack() as stack:
        rivals = [
            stack.enter_context(processes.start(name, python, worker, variant, paths))
            for name, (python, worker) in workers.items()
        ]
        for turn in range(-1, args.repeats):  # the first turn compiles
            for rival in rivals:
                seconds = rival.ask("step", ids=ids)
                said = f"{variant}, {turn + 1}/{args.repeats}, {rival.name}: {seconds:.2f} s"
                print(said, file=sys.stderr)
                if turn >= 0:
                    rival.runs.setdefault("step", []).append(seconds)
        measured = {
            rival.name: {
                "seconds": rival.median("step"),
                "runs": rival.runs["step"],
                "peak_bytes": rival.peak_bytes(),
                "last_loss": rival.results["step"],
                "facts": rival.facts,
            }
            for rival in rivals
        }
    ours, theirs = measured[OURS], measured[TORCH]
    measured["times_as_fast"] = theirs["seconds"] / ours["seconds"]
    measured["share_of_memory"] = ours["peak_bytes"] / theirs["peak_bytes"]
    return measured


def _command(args: argparse.Namespace) -> str:
    return (
        f"python -m gemma_jax.benchmarks.training --torch-python PATH --model {args.model} "
        f"--tokens {args.tokens} --repeats {args.repeats} --cores {args.cores}"
    )


if __name__ == "__main__":
    main()
