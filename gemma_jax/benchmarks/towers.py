"""What comparisons of towers at their real size share: processes that take turns on one machine.

A tower is made once, with random weights, by the side of the rival. Each rival is a worker that
answers `encode` with seconds and the peak memory of its process, and writes what came out to a
file. Some can do further works of the same kind.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import numpy as np
from safetensors.numpy import load_file, save_file

from gemma_jax.benchmarks import processes
from gemma_jax.benchmarks import speed as benchmark


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Says what is compared with what.

    Attributes:
      module: Of the command.
      needs: What the rival's interpreter must have.
      torch, ours: Scripts in `workers/`; `torch make PATH` writes the random weights.
      rivals: Name -> script and its variant.
      exact: Name, script and variant of the run in float64.
      stands_in: Rival that errors are measured from where there is no exact run.
      inputs: Name -> array that every rival reads.
      further: Name of a rival -> works beside `encode`, which it does in the same turns.
    """

    module: str
    needs: str
    torch: str
    ours: str
    rivals: Mapping[str, tuple[str, str]]
    exact: tuple[str, str, str]
    stands_in: str
    inputs: Mapping[str, np.ndarray]
    further: Mapping[str, Sequence[str]] = field(default_factory=dict)


def main(comparison: Comparison) -> None:
    """Runs the command line of a comparison."""
    parser = argparse.ArgumentParser(prog=f"python -m {comparison.module}")
    needs = f"interpreter that has {comparison.needs}"
    parser.add_argument("--torch-python", required=True, help=needs)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--exact", action="store_true", help="measure errors against float64")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # children inherit it
    machine = benchmark.machine_facts()
    found = compare(comparison, args)
    words = ["--exact"] if args.exact else []
    words += [f"--repeats {args.repeats} --cores {args.cores}"]
    result = {
        "command": " ".join([f"python -m {comparison.module} --torch-python PATH", *words]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "load_average_1min_at_the_end": round(os.getloadavg()[0], 2),
        "rivals": found,
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


def compare(comparison: Comparison, args: argparse.Namespace) -> dict[str, dict]:
    """Seconds, memory and largest errors by rival."""
    outputs, running = {}, {}
    exact, *exact_worker = comparison.exact
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        worker = str(processes.WORKERS / comparison.torch)
        subprocess.run([args.torch_python, worker, "make", str(work / "weights")], check=True)
        save_file(dict(comparison.inputs), work / "inputs.safetensors")

        def works(name: str) -> dict[str, str]:
            """Label -> work, of all that a rival does."""
            further = comparison.further.get(name, ())
            return {name: "encode"} | {f"{name}, {work}": work for work in further}

        def start(name: str, worker: str, variant: str, stack: ExitStack) -> processes.Rival:
            paths = {"weights": "weights", "inputs": "inputs.safetensors", "output": f"{name}.out"}
            paths = {key: str(work / path) for key, path in paths.items()}
            python = sys.executable if worker == comparison.ours else args.torch_python
            rival = stack.enter_context(processes.start(name, python, worker, variant, paths))
            for label, asked in works(name).items():
                rival.ask(asked)  # compiles, and touches the memory
                outputs[label] = load_file(paths["output"])
            return rival

        if args.exact:
            with ExitStack() as alone:  # it holds twice the memory, and need not stay
                start(exact, *exact_worker, alone)
        for name, (worker, variant) in comparison.rivals.items():
            running[name] = start(name, worker, variant, stack)
        for _ in range(args.repeats):
            for name, rival in running.items():
                for asked in works(name).values():
                    rival.runs.setdefault(asked, []).append(rival.ask(asked))
    found = {
        label: {
            "seconds": rival.median(asked),
            "runs": rival.runs[asked],
            "peak_bytes": rival.results[asked],
            "facts": rival.facts,
        }
        for name, rival in running.items()
        for label, asked in works(name).items()
    }
    true = outputs[exact if args.exact else comparison.stands_in]
    for name, entry in found.items():
        for key, values in outputs[name].items():
            entry[f"{key}_max_error"] = float(np.abs(values - true[key]).max())
            entry[f"{key}_max"] = float(np.abs(values).max())
    return found
