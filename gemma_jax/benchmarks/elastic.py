"""A Gemma 3n of 200 million parameters: decoding beside transformers, and what elasticity costs.

    python -m gemma_jax.benchmarks.elastic --torch-python torch-env/bin/python --output RESULT.json

Random weights, float32, batch 1, on the CPU. Everybody takes turns, as in `rivals.py`:

    whole     the model, in gemma-jax and in transformers
    slice     half of the feed-forward width, as a model of its own
    view      the same submodel as a view of the whole one
    switched  the same view, after the whole model has run in between
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import jax
from flax import nnx

from gemma_checkpoints import save_hf
from gemma_jax import Gemma, matformer
from gemma_jax.benchmarks import processes
from gemma_jax.benchmarks import speed as benchmark
from gemma_jax.config import (
    AltUpConfig,
    GemmaConfig,
    LayerSpec,
    PerLayerConfig,
    share_kv,
)


def config() -> GemmaConfig:
    """15 layers of E2B's kind at half its width."""
    specs = [
        LayerSpec(
            kind="global" if (i + 1) % 5 == 0 else "local",
            window=None if (i + 1) % 5 == 0 else 512,
            rope_theta=1e6 if (i + 1) % 5 == 0 else 1e4,
            d_ff=3_072,
            sparsity=0.95 if i < 5 else 0.0,
        )
        for i in range(15)
    ]
    return GemmaConfig(
        vocab_size=16_384,
        d_model=1_024,
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        query_pre_attn_scalar=1,
        layers=share_kv(specs, 5),
        max_positions=4_096,
        qk_norm=True,
        post_norms=True,
        final_soft_cap=30.0,
        optional_final_cap=True,
        scale_plus_one=False,
        v_norm=True,
        altup=AltUpConfig(),
        laurel_rank=64,
        per_layer=PerLayerConfig(width=64, vocab_size=16_384),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-python", required=True, help="interpreter that has transformers")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
    machine, cfg = benchmark.machine_facts(), config()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = jax.jit(lambda: Gemma(cfg, rngs=nnx.Rngs(0), layout="unrolled"))()
        parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
        save_hf(model, work / "hf")
        del model
        half = tuple(spec.d_ff // 2 for spec in cfg.layers)
        matformer.Slice(ffn_widths=half).write(work / "slice.json")
        paths = {"hf": str(work / "hf"), "slice": str(work / "slice.json")}
        ours, theirs = (
            stack.enter_context(processes.start(name, python, worker, "float32", paths))
            for name, python, worker in (
                ("gemma-jax", sys.executable, "ours_elastic.py"),
                ("transformers", args.torch_python, "hf_torch.py"),
            )
        )
        order = {
            "transformers, whole": (theirs, {}),
            "gemma-jax, slice": (ours, {"model": "slice"}),
            "gemma-jax, view": (ours, {"model": "view"}),
            "gemma-jax, whole": (ours, {"model": "whole"}),
            "gemma-jax, view, switched to": (ours, {"model": "view"}),
        }
        request = {"ids": list(range(5, 21)), "new_tokens": args.new_tokens}
        runs, tokens = {name: [] for name in order}, {}
        for turn in range(-1, args.repeats):  # the first turn compiles
            for name, (rival, which) in order.items():
                seconds = rival.ask("decode", room=args.new_tokens, **request, **which)
                tokens[name] = rival.results["decode"]
                if turn >= 0:
                    runs[name].append(args.new_tokens / seconds)
    speed = {name: statistics.median(values) for name, values in runs.items()}
    pairs = {
        "whole, to transformers": ("gemma-jax, whole", "transformers, whole"),
        "view, to slice": ("gemma-jax, view", "gemma-jax, slice"),
        "view switched to, to view": ("gemma-jax, view, switched to", "gemma-jax, view"),
    }
    same = zip(tokens["gemma-jax, whole"], tokens["transformers, whole"])
    result = {
        "command": "python -m gemma_jax.benchmarks.elastic --torch-python PATH "
        f"--new-tokens {args.new_tokens} --repeats {args.repeats} --cores {args.cores}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "versions": {"gemma-jax": ours.facts, "transformers": theirs.facts},
        "parameters": parameters,
        "tokens_per_s": {name: {"median": speed[name], "runs": runs[name]} for name in order},
        "ratios": {name: speed[a] / speed[b] for name, (a, b) in pairs.items()},
        "ratios_of_best_runs": {
            name: max(runs[a]) / max(runs[b]) for name, (a, b) in pairs.items()
        },
        "first_tokens_equal_to_transformers": next(
            (i for i, (a, b) in enumerate(same) if a != b), args.new_tokens
        ),
        "view_and_slice_write_the_same": tokens["gemma-jax, view"] == tokens["gemma-jax, slice"],
    }
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
