"""Multiple choice: contexts read once for all their choices, beside every pair by itself.

    python -m gemma_jax.benchmarks.shared_prefixes --output RESULT.json

Made-up questions: contexts of random ids and lengths, four choices of a few tokens each. The other
order is what evaluations commonly do: context and choice as one row, rows of like length in
batches, in one pass without a cache; logits of the choices alone are computed there, too. Both
orders have the same model, the same bound on the tokens of a pass and the same rounding up of
shapes, run after one another in one process, and must agree.

Local letters: X tokens of choices.
"""

import argparse
import json
import statistics
import sys
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gemma_jax as gj
from gemma_jax.benchmarks.speed import machine_facts
from gemma_jax.decoder.batch import power_of_two
from gemma_jax.evaluation.continuations import BATCH_TOKENS, score_continuations
from gemma_jax.inference.prefill import bucket

Pairs = list[tuple[list[int], list[int]]]
GATE = 3.0  # times as fast as each pair by itself
ATOL = 1e-3  # nats, of a sum


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--context", type=int, default=240, help="tokens, at most")
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    model = gj.load_model(asked.model, dtype="float32", modalities=("text",))
    result = measure(model, asked.questions, asked.context, asked.choices, asked.repeats)
    result |= {"model": asked.model, "jax": jax.__version__, "machine": machine_facts()}
    result["command"] = " ".join(["python -m gemma_jax.benchmarks.shared_prefixes", *sys.argv[1:]])
    text = json.dumps(result, indent=1) + "\n"
    print(text) if asked.output is None else asked.output.write_text(text, "utf-8")


def measure(
    model: gj.Gemma, questions: int, context: int, choices: int, repeats: int
) -> dict[str, Any]:
    """Seconds of both orders and how far their sums are apart.

    Raises:
      ValueError: They disagree.
    """
    pairs = made_up(model.cfg.vocab_size, questions, context, choices)
    orders = {"shared": shared, "naive": naive}
    sums = {name: run(model, pairs) for name, run in orders.items()}  # compiles as well
    apart = float(np.abs(sums["shared"] - sums["naive"]).max())
    if not apart < ATOL:
        raise ValueError(f"the sums of both orders are {apart} apart")
    seconds: dict[str, list[float]] = {name: [] for name in orders}
    for _ in range(repeats):
        for name, run in orders.items():
            start = time.perf_counter()
            run(model, pairs)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "pairs": len(pairs),
        "tokens": sum(len(c) + len(t) for c, t in pairs),
        "seconds": seconds,
        "speedup": medians["naive"] / medians["shared"],
        "gate": GATE,
        "largest_difference": apart,
    }


def made_up(vocab_size: int, questions: int, context: int, choices: int) -> Pairs:
    """Pairs of ids: every question with all its choices, of 1 to 6 tokens."""
    rng = np.random.default_rng(0)
    pairs: Pairs = []
    for _ in range(questions):
        asked = rng.integers(3, vocab_size, rng.integers(context * 3 // 4, context + 1)).tolist()
        pairs += [
            ([2, *asked[1:]], rng.integers(3, vocab_size, rng.integers(1, 7)).tolist())
            for _ in range(choices)
        ]
    return pairs


def shared(model: gj.Gemma, pairs: Pairs) -> np.ndarray:
    """Sum of each pair; contexts are read once."""
    return np.array([score.log_probs.sum() for score in score_continuations(model, pairs)])


def naive(model: gj.Gemma, pairs: Pairs) -> np.ndarray:
    """Sum of each pair; every one is a row of its own."""
    sums = np.zeros(len(pairs))
    order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
    for width, group in groupby(order, key=lambda i: bucket(sum(map(len, pairs[i])) - 1)):
        numbers, count = list(group), max(BATCH_TOKENS // width, 1)
        for start in range(0, len(numbers), count):
            part = numbers[start : start + count]
            sums[part] = _naive_batch(model, [pairs[i] for i in part], width, count)
    return sums


def _naive_batch(model: gj.Gemma, pairs: Pairs, width: int, count: int) -> np.ndarray:
    most = max(len(continuation) for _, continuation in pairs)
    batch = gj.Batch.padded([[*c, *t][:-1] for c, t in pairs], width, count=count)
    places_BX = np.zeros((count, power_of_two(most)), np.int32)
    targets_BX = np.full_like(places_BX, -1)
    for i, (context, continuation) in enumerate(pairs):
        n = len(continuation)
        places_BX[i, :n] = len(context) - 1 + np.arange(n)
        targets_BX[i, :n] = continuation
    sums = _naive_sums(model, batch, places_BX, targets_BX)
    return np.asarray(sums)[: len(pairs)]


@jax.jit
def _naive_sums(model, batch, places_BX, targets_BX) -> jax.Array:
    out = gj.forward(model, batch, logits="none", capture="final_norm")
    x_BXD = jnp.take_along_axis(out.captured["final_norm"], places_BX[:, :, None], axis=1)
    return -jnp.sum(gj.token_losses(model, x_BXD, targets_BX), axis=1)


if __name__ == "__main__":
    main()
