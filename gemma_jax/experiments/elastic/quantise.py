"""Trains the elastic model for a file of 4 bits, and measures what rounding costs without and with.

    python -m gemma_jax.experiments.elastic.quantise OUT

writes two GGUF files (Q4_0) to the folder OUT, with `results.json`. Some ten minutes on two CPU
cores. Training goes on twice from the same weights, over the same rows of the text that the model
was trained with, and lowers the cross-entropy of the next token: once of the model in floats, which
is rounded afterwards, and once of the rounded model. What each of them loses is the distance from
the first one in floats, on the held-out text.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import jax
import numpy as np
import optax

import gemma_jax as gj
from gemma_checkpoints import save_gguf
from gemma_jax.experiments.elastic.corpus import digest, documents, split
from gemma_jax.experiments.elastic.train import SLICES, encode, measure, random_rows, rows
from gemma_jax.training.step import Objective

SOURCE = "checkpoints/elastic"
STEPS, RATE = 300, 1e-3
# What a Q4_0 file makes of each matrix: `gemma_checkpoints.gguf.mix` says it by their names there.
RULES = {
    "embed.table": "q8_0",
    "*.attn.*": "q4_0",
    "*.ffn.*": "q4_0",
    "*.per_layer.gate.w": "q4_0",
    "*.altup.predictor.w": "float32",
    "*.altup.corrector.w": "float32",
    "*": "float16",
}


def train(
    model: gj.Gemma,
    tokenizer: gj.Tokenizer,
    objective: Objective,
    ids: np.ndarray,
    steps: int,
    seed: int,
) -> gj.Gemma:
    """The model in floats after some steps."""
    trained, frozen, join = gj.trainable(model)
    rate = optax.cosine_decay_schedule(RATE, steps)
    init, step = gj.make_step(objective, optax.adam(rate), join)
    state, step = init(trained, jax.random.key(seed)), jax.jit(step, donate_argnums=0)
    random, start = np.random.default_rng(seed), time.perf_counter()
    for i in range(steps):
        state, metrics = step(state, frozen, random_rows(tokenizer, ids, random))
        if i % 50 == 49:
            seconds = time.perf_counter() - start
            print(f"step {i + 1}: loss {metrics['loss']:.3f}, {seconds:.0f} s", flush=True)
    return join(state.trained, frozen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.out.mkdir()
    model, tokenizer = gj.load(SOURCE, dtype="float32", layout="unrolled")
    texts = documents()
    kept, held_out = split(texts)
    if "\n\n".join(held_out) != Path(SOURCE, "held_out.txt").read_text("utf-8"):
        raise SystemExit(
            "the text of this Python is not the one that the model was trained with: "
            f"expected what {SOURCE}/results.json names, use that version of Python"
        )
    ids = encode(tokenizer, kept)
    held_out_BT = rows(tokenizer, encode(tokenizer, held_out))

    def trained(objective: Objective) -> gj.Gemma:
        return train(model, tokenizer, objective, ids, args.steps, args.seed)

    def loss(model: gj.Gemma) -> float:
        return measure(model, tokenizer, held_out_BT, SLICES["full"])["nats_per_token"]

    def loss_in_file(name: str, model: gj.Gemma) -> float:
        path = args.out / f"{name}.gguf"
        save_gguf(gj.fake_quantise(model, RULES), path, "q4_0", source=SOURCE)
        return loss(gj.load_model(str(path), dtype="float32", layout="unrolled"))

    in_floats = trained(gj.next_token)
    losses = {
        "before": loss(model),
        "floats": loss(in_floats),
        "rounded": loss_in_file("rounded", in_floats),
        "trained for rounding": loss_in_file(
            "trained-for-rounding", trained(gj.quantisation_aware(gj.next_token, RULES))
        ),
    }
    plain, after = (losses[name] - losses["floats"] for name in ("rounded", "trained for rounding"))
    results = {
        "command": f"python -m gemma_jax.experiments.elastic.quantise OUT --steps {args.steps} "
        f"--seed {args.seed}",
        "python": platform.python_version(),
        "text": digest(texts),
        "rules": RULES,
        "nats_per_token": losses,
        "lost_by_rounding": round(plain, 4),
        "lost_when_trained_for_it": round(after, 4),
        "share": round(after / plain, 3),
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
