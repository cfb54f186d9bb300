"""End to end on one accelerator: decoding and prefill of every size, beside transformers.

    python -m gemma_jax.benchmarks.decode_loop --torch-python PYTHON --output RESULT.json

Random weights in bfloat16. Our token loop runs whole inside one `jax.jit`, in both layouts of the
layers; transformers has SDPA and a static cache, with and without torch.compile. Each has the
device to itself: a process that loads, does all the work of one model, and ends.

The share of the roofline is that of the bytes which a step has to read, the weights and the keys
and values in sight, at the bandwidth that copying reaches on the same device.

    --tiny    a model of a few layers, which runs anywhere in a minute
"""

import argparse
import dataclasses
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Each process takes the memory it needs, and compiles what it compiled before from the disk.
os.environ |= {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "HF_HUB_OFFLINE": "1",
    "JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache" / "gemma-jax" / "decode_loop"),
}

import numpy as np

from gemma_checkpoints.hf.config_out import config_to_hf
from gemma_jax.benchmarks.processes import Rival, start
from gemma_jax.config import GemmaConfig
from gemma_jax.presets import preset

MODELS = ("270m", "1b", "4b", "12b", "27b")
# name -> (option that gives its interpreter, worker, variant)
RIVALS = {
    "gemma-jax scan": ("python", "loop_ours.py", "scan"),
    "gemma-jax unrolled": ("python", "loop_ours.py", "unrolled"),
    "transformers": ("torch_python", "loop_torch.py", "eager"),
    "transformers compiled": ("torch_python", "loop_torch.py", "compile"),
}
OURS = "loop_ours.py"
ITEM = 2  # bytes of a bfloat16


def tiny() -> GemmaConfig:
    """Gemma 3 270M cut down to two layers of each kind and a small vocabulary."""
    cfg = preset("gemma3-270m")
    local, wide = cfg.layers[0], cfg.layers[5]
    layers = tuple(dataclasses.replace(s, d_ff=128) for s in (local, wide, local, wide))
    return dataclasses.replace(
        cfg, vocab_size=512, d_model=64, head_dim=32, query_pre_attn_scalar=32, layers=layers
    )


def decoder(name: str) -> GemmaConfig:
    return dataclasses.replace(preset(f"gemma3-{name}"), vision=None)


def step_bytes(cfg: GemmaConfig, weights: int, batch: int, context: int) -> int:
    """What one step reads at least: all weights once, and every row's keys and values in sight."""
    slots = sum(min(spec.window or context, context) for spec in cfg.layers)
    return weights + batch * slots * 2 * cfg.num_kv_heads * cfg.head_dim * ITEM


def rows(cfg: GemmaConfig, batch: int, length: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(3, cfg.vocab_size, (batch, length)).tolist()


def measure(rival: Rival, cfg: GemmaConfig, args) -> dict:
    """Tokens per second of all kinds of work; what fails is told in the place of its figures."""
    found: dict[str, dict] = {}
    new = args.new_tokens
    for batch in args.batch:
        ids = rows(cfg, batch, args.prompt_tokens)
        request = {"ids": ids, "new_tokens": new, "room": new}
        found[f"decode, batch {batch}"] = timed(rival, "decode", batch * new, request, args)
    for length in args.prefill:
        length = min(length, cfg.max_positions - 1)  # one place is for the token that is chosen
        request = {"ids": rows(cfg, 1, length)}
        found[f"prefill, {length} tokens"] = timed(rival, "prefill", length, request, args)
    return found


def profile(rival: Rival, cfg: GemmaConfig, args) -> dict[str, float]:
    """Where the time of decoding a single row goes; not among the runs that are timed."""
    ids, new = rows(cfg, 1, args.prompt_tokens), args.new_tokens
    rival.ask("profile", ids=ids, new_tokens=new, room=new)
    return rival.results["profile"]


def timed(rival: Rival, work: str, tokens: int, request: dict, args) -> dict:
    runs = [rival.ask(work, **request) for _ in range(1 + args.repeats)][1:]  # the first compiles
    speed = tokens / statistics.median(runs)
    print(f"{rival.name}: {work} of {tokens} tokens, {speed:,.1f} tokens/s", file=sys.stderr)
    return {"tokens_per_s": speed, "seconds": runs}


def compare(name: str, cfg: GemmaConfig, args) -> dict:
    """All rivals on one model, one after another."""
    results, ran = {}, False
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(config_to_hf(cfg)))
        for rival_name, (option, worker, variant) in RIVALS.items():
            if (python := getattr(args, option)) is None:
                results[rival_name] = {"skipped": f"no --{option.replace('_', '-')} given"}
                continue
            label = f"{name}, {rival_name}"
            try:
                with start(label, python, worker, variant, {"config": str(config)}) as rival:
                    entry = {"facts": rival.facts}
                    if worker == OURS:
                        seconds = rival.ask("copy", size=args.copy_bytes)
                        entry["copy_bytes_per_s"] = 2 * args.copy_bytes / seconds
                    entry |= measure(rival, cfg, args)
                    if worker == OURS:
                        entry["seconds_by_scope"] = profile(rival, cfg, args)
            except (OSError, RuntimeError) as error:  # out of memory, for one
                results[rival_name] = {"failed": str(error)}
                print(f"{label}: {error}", file=sys.stderr)
                continue
            if worker == OURS:
                add_shares(entry, cfg, args)
                ran = True
            results[rival_name] = entry
    if not ran:
        raise RuntimeError(f"{name}: gemma-jax did not run: {results}")
    return results


def add_shares(entry: dict, cfg: GemmaConfig, args) -> None:
    """Adds to decoding which share of the roofline it reaches, at the context halfway through."""
    context = args.prompt_tokens + args.new_tokens // 2
    for batch in args.batch:
        work = entry[f"decode, batch {batch}"]
        size = step_bytes(cfg, entry["facts"]["parameter_bytes"], batch, context)
        roofline = batch * entry["copy_bytes_per_s"] / size
        work |= {
            "roofline_tokens_per_s": roofline,
            "share_of_roofline": work["tokens_per_s"] / roofline,
        }


def print_table(found: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    for name, rivals in found["models"].items():
        works = [
            work for work in rivals["gemma-jax scan"] if work.startswith(("decode", "prefill"))
        ]
        table = Table(title=f"{name}: tokens/s (share of the roofline)")
        for head in ("", *works):
            table.add_column(head, justify="right" if head else "left")
        for rival, entry in rivals.items():
            cells = [_cell(entry.get(work)) for work in works]
            table.add_row(rival, *cells)
        Console().print(table)


def _cell(work: dict | None) -> str:
    if work is None:
        return "-"
    share = work.get("share_of_roofline")
    return f"{work['tokens_per_s']:,.1f}" + ("" if share is None else f" ({share:.0%})")


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-python", help="interpreter that has `transformers`")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tiny", action="store_true", help="a tiny model and little work")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="in front of decoding")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--prefill", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copy-bytes", type=int, default=2 << 30, help="of the copy that is timed")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.set_defaults(python=sys.executable)
    args = parser.parse_args(words)
    if args.tiny:
        args.batch, args.prompt_tokens, args.new_tokens = [1, 2], 20, 8
        args.prefill, args.repeats, args.copy_bytes = [64], 1, 1 << 20
    return args


def main(words: list[str] | None = None) -> None:
    args = _arguments(words)
    models = {"tiny": tiny()} if args.tiny else {name: decoder(name) for name in args.models}
    found = {
        "command": _command(args),
        "date": time.strftime("%Y-%m-%d"),
        "driver": _driver(),
        "work": f"{args.new_tokens} greedy tokens after {args.prompt_tokens}, per row; prefill of "
        "one row to its first new token; bfloat16, random weights",
        "models": {},
    }
    for name, cfg in models.items():
        found["models"][name] = compare(name, cfg, args)
        if args.output:  # after every model: a machine may be taken away
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(found, indent=1) + "\n")
    print_table(found)


def _command(args) -> str:
    """The command line, with PATH in place of the paths of this machine."""
    words = ["python", "gemma_jax/benchmarks/decode_loop.py"]
    if args.tiny:
        words.append("--tiny")
    else:
        for name in ("models", "batch", "prefill"):
            words += [f"--{name}", *map(str, getattr(args, name))]
        for name in ("prompt_tokens", "new_tokens", "repeats"):
            words += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    for name in ("torch_python", "output"):
        if getattr(args, name):
            words += ["--" + name.replace("_", "-"), "PATH"]
    return shlex.join(words)


def _driver() -> str | None:
    """What the NVIDIA driver says of itself and its first device; `None` without one."""
    command = [
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    main()
