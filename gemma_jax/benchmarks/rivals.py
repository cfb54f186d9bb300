"""The same work through gemma-jax and its rivals, in one run, on the CPU.

Every rival is a process that is kept alive (`workers/`), with its own Python environment. They take
turns, A B C A B C ..., so that a machine that slows down slows all of them. See README.md.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    # Compiling is never timed; a second run of this script need not wait for it again.
    "JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache" / "gemma-jax" / "rivals"),
}

import gemma_jax
from gemma_checkpoints import load_weights, resolve, save_hf
from gemma_jax.benchmarks import speed as benchmark
from gemma_jax.benchmarks.processes import Rival, start

PROMPT = "The capital of France is"
BASELINE = "gemma-jax float32"
WARM_UP = 4  # tokens
# Slots of the cache for the token loop, of which the prompt and the new tokens fill a few.
SLOTS = {"decode": 128, "decode, 1,024 slots": 1_024, "decode, 8,192 slots": 8_192}
# name -> (option that gives its interpreter, worker, variant)
RIVALS = {
    BASELINE: ("python", "ours.py", "float32"),
    "gemma-jax bfloat16 weights": ("python", "ours.py", "bfloat16"),
    "gemma-jax int8 weights": ("python", "ours.py", "int8"),
    "gemma-jax stored weights": ("python", "ours.py", "stored"),
    "gemma-jax stored weights, int8 activations": ("python", "ours.py", "stored int8"),
    "gemma-jax float32, earlier checkout": ("before_python", "ours.py", "float32"),
    "gemma-jax int8 weights, earlier checkout": ("before_python", "ours.py", "int8"),
    "transformers float32": ("torch_python", "hf_torch.py", "float32"),
    "transformers bfloat16": ("torch_python", "hf_torch.py", "bfloat16"),
    "google-deepmind/gemma float32": ("gdm_python", "google_deepmind.py", "float32"),
    "google-deepmind/gemma bfloat16": ("gdm_python", "google_deepmind.py", "bfloat16"),
    "llama.cpp Q4_K_M": ("llama_python", "llama_cpp_python.py", "Q4_K_M"),
}


def measure(rivals: list[Rival], long: list[int], short: list[int], args) -> None:
    """Warms every rival up, then lets them take turns."""
    new = args.new_tokens
    work = {"prefill": (len(long), {"ids": long})}
    for name, slots in SLOTS.items():
        room = max(new, slots - len(short) - 1)
        work[name] = new, {"ids": short, "new_tokens": new, "room": room}

    def does(rival: Rival, name: str) -> bool:
        """Only ours can be told how long a cache shall be."""
        return name in ("prefill", "decode") or rival.name.startswith("gemma-jax")

    for rival in rivals:
        print(f"warm-up of {rival.name}", file=sys.stderr)
        for name, (_, request) in work.items():
            if does(rival, name):
                few = {"new_tokens": min(WARM_UP, new)} if "new_tokens" in request else {}
                rival.ask(name.partition(",")[0], **request | few)
    for repeat in range(args.repeats):
        awake = [rival for rival in rivals if repeat == 0 or rival.spent_s < args.limit]
        for name, (tokens, request) in work.items():
            for rival in (rival for rival in awake if does(rival, name)):
                speed = tokens / rival.ask(name.partition(",")[0], **request)
                rival.runs.setdefault(name, []).append(speed)
                turn = f"{name} {repeat + 1}/{args.repeats}, {rival.name}"
                print(f"{turn}: {speed:.1f} tokens/s", file=sys.stderr)


def result(rivals: list[Rival], skipped: dict[str, str], args, machine: dict) -> dict:
    """Everything that was measured and what it was measured on, as JSON."""
    base = next(r for r in rivals if r.name == BASELINE)
    entries = {}
    for rival in rivals:
        tokens, expected = rival.results["decode"], base.results["decode"]
        same = next((i for i, (a, b) in enumerate(zip(tokens, expected)) if a != b), len(tokens))
        entries[rival.name] = {
            work: {
                "tokens_per_s": rival.median(work),
                "ratio_to_gemma_jax_float32": rival.median(work) / base.median(work),
                "runs": runs,
            }
            for work, runs in rival.runs.items()
        } | {"first_tokens_equal_to_gemma_jax_float32": same, "facts": rival.facts}
    return {
        "command": _command(args),
        "date": time.strftime("%Y-%m-%d"),
        "work": f"prefill of {args.prompt_tokens} tokens; {args.new_tokens} greedy tokens after "
        "a short prompt; batch 1",
        "machine": machine | {"load_average_1min_at_the_end": round(os.getloadavg()[0], 2)},
        "rivals": entries,
        "skipped": skipped,
    }


def print_table(found: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = found["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, load {machine['load_average_1min']}"
    table = Table(title=found["work"], caption=f"tokens/s, medians; {where}")
    works = ("prefill", *SLOTS)
    for head in ("", *(column for work in works for column in (work, "x")), "same tokens"):
        table.add_column(head, justify="right" if head else "left")
    for name, entry in found["rivals"].items():
        cells = []
        for work in works:
            if work not in entry:
                cells += ["", ""]
                continue
            ratio = entry[work]["ratio_to_gemma_jax_float32"]
            cells += [f"{entry[work]['tokens_per_s']:,.1f}", f"{ratio:.2f}"]
        table.add_row(name, *cells, str(entry["first_tokens_equal_to_gemma_jax_float32"]))
    Console().print(table)
    for name, why in found["skipped"].items():
        print(f"skipped: {name} ({why})")


def _command(args) -> str:
    """The command line, with PATH in place of the paths of this machine."""
    words = ["python", "gemma_jax/benchmarks/rivals.py"]
    for name, value in vars(args).items():
        if value is not None and name not in ("python", "before_python"):
            is_path = name.endswith("python") or name in ("hf_folder", "output", "before")
            words.append("--" + name.replace("_", "-"))
            words += value if isinstance(value, list) else ["PATH" if is_path else str(value)]
    return shlex.join(words)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, package in (("torch", "transformers"), ("gdm", "gemma"), ("llama", "llama_cpp")):
        parser.add_argument(f"--{name}-python", help=f"interpreter that has `{package}`")
    parser.add_argument("--before", help="folder of another checkout, for the earlier gemma-jax")
    parser.add_argument(
        "--only", nargs="+", help="rivals to run beside the first, by parts of names"
    )
    parser.add_argument("--model", default="gemma3-270m", help="catalog name, or a GGUF file")
    parser.add_argument("--hf-folder", help="float32 export; made there if it does not exist")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60, help="seconds before a rival sits out")
    parser.add_argument("--cores", type=int, default=2, help="cores that everybody gets")
    parser.add_argument("--output", help="JSON file to write")
    parser.set_defaults(python=sys.executable)
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    args.before_python = sys.executable if args.before else None
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])  # children inherit it
    machine = benchmark.machine_facts()
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        gguf, hf = resolve(args.model), Path(args.hf_folder or f"{temporary}/hf")
        if not hf.exists():
            save_hf(load_weights(gguf, dtype="float32"), hf, source=gguf)
        paths = {"model": args.model, "gguf": str(gguf), "hf": str(hf)}
        short = gemma_jax.load_tokenizer(args.model).encode(PROMPT, bos=True)
        long = (short * args.prompt_tokens)[: args.prompt_tokens]
        rivals = []
        for name, (option, worker, variant) in RIVALS.items():
            if args.only and name != BASELINE and not any(part in name for part in args.only):
                skipped[name] = "left out by --only"
                continue
            if (python := getattr(args, option)) is None:
                skipped[name] = f"no --{option.replace('_', '-')} given"
                continue
            at = paths | ({"checkout": args.before} if option == "before_python" else {})
            try:
                rivals.append(stack.enter_context(start(name, python, worker, variant, at)))
            except (OSError, RuntimeError) as error:
                if name == BASELINE:
                    raise
                skipped[name] = str(error)
        measure(rivals, long, short, args)
    found = result(rivals, skipped, args, machine)
    print_table(found)
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
