"""The real vision tower (So400m, 896 pixels) beside transformers, in one run, on the CPU.

    python -m gemma_jax.benchmarks.siglip --torch-python torch-env/bin/python --output RESULT.json

Random weights, made once by the torch side, and one image of noise. Says how far the soft tokens of
each are from transformers' in float64 (`--exact`, which is slow), seconds per image, and the peak
memory of each process. The processes take turns and share the same cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import numpy as np
from safetensors.numpy import load_file, save_file

from gemma_jax.benchmarks import processes
from gemma_jax.benchmarks import speed as benchmark

TORCH, OURS = "siglip_torch.py", "siglip_ours.py"
RIVALS = {
    "transformers float32, sdpa": (TORCH, "float32"),
    "transformers float32, eager": (TORCH, "eager"),
    "gemma-jax float32": (OURS, "float32"),
}
EXACT = "transformers float64"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-python", required=True, help="interpreter that has transformers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="measure errors against float64")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    machine = benchmark.machine_facts()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make = [args.torch_python, str(processes.WORKERS / TORCH), "make", str(work / "hf")]
        subprocess.run(make, check=True)
        pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 896, 896)).astype(np.float32)
        save_file({"pixel_values": pixels}, work / "pixels.safetensors")
        named = RIVALS | ({EXACT: (TORCH, "float64")} if args.exact else {})
        found, outputs, running = {}, {}, {}
        for name, (worker, variant) in named.items():
            paths = {"hf": "hf", "pixels": "pixels.safetensors", "output": f"{variant}{worker}.out"}
            paths = {key: str(work / path) for key, path in paths.items()}
            python = sys.executable if worker == OURS else args.torch_python
            rival = stack.enter_context(processes.start(name, python, worker, variant, paths))
            rival.ask("encode")  # compiles, and touches the memory
            outputs[name] = load_file(paths["output"])
            running[name] = rival
        for _ in range(args.repeats):
            for name in RIVALS:
                running[name].runs.setdefault("encode", []).append(running[name].ask("encode"))
        for name in RIVALS:
            rival = running[name]
            found[name] = {
                "seconds": rival.median("encode"),
                "runs": rival.runs["encode"],
                "peak_bytes": rival.results["encode"],
                "facts": rival.facts,
            }
    exact = outputs[EXACT if args.exact else "transformers float32, eager"]
    for name, entry in found.items():
        for key, values in outputs[name].items():
            entry[f"{key}_max_error"] = float(np.abs(values - exact[key]).max())
            entry[f"{key}_max"] = float(np.abs(values).max())
    words = ["--exact"] if args.exact else []
    result = {
        "command": " ".join(
            ["python -m gemma_jax.benchmarks.siglip --torch-python PATH", *words,
             f"--repeats {args.repeats} --cores {args.cores}"]
        ),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "rivals": found,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
