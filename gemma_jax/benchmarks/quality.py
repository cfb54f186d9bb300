"""What narrower weights and caches cost on a text: perplexity, and the distance to float32.

    python -m gemma_jax.benchmarks.quality --output gemma_jax/benchmarks/results/quality-270m.json

Per mode: perplexity; KL divergence of its distribution from that of float32 weights, in nats per
token (mean over the text); how often both think the same token likeliest; mean change of the
log-probability of the token that comes; bytes of the weights. Arithmetic is float32, but for the
modes that round activations too (`/int8`) and those that say bfloat16. Where a mode names a cache,
the text is read through it in chunks, so that all keys and values are read back as they are kept.

Local letters: V vocabulary.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gemma_jax as gj
from gemma_jax.benchmarks.speed import machine_facts
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import Cache
from gemma_jax.placement import empty_cache
from gemma_jax.storages import StorageRules, WeightStorage
from gemma_jax.weights.protocol import array_bytes

TEXT = Path("checkpoints/elastic/held_out.txt")
MIXED: StorageRules = {"embed.*": "int8", "*": "int4"}


def _mode(
    weights: WeightStorage | StorageRules | None = None, dtype: str = "float32", **more: Any
) -> gj.LoadOptions:
    return gj.LoadOptions(weights=weights, dtype=dtype, **more)


MODES = {
    "bfloat16": _mode("bfloat16"),
    "bfloat16, arithmetic too": _mode(dtype="bfloat16"),
    "int8": _mode("int8"),
    "int8:32": _mode("int8:32"),
    "int8:32/int8": _mode("int8:32", activations="int8"),
    "stored": _mode("stored"),
    "stored/int8": _mode("stored", activations="int8"),
    "embedding int8, rest int4": _mode(MIXED),
    "int4": _mode("int4"),
    "int4:64": _mode("int4:64"),
    "int4:128": _mode("int4:128"),
    "float32, float32 cache": _mode(cache_dtype="float32"),
    "float32, bfloat16 cache": _mode(cache_dtype="bfloat16"),
    "float32, int8 cache": _mode(cache_dtype="int8"),
    "bfloat16, arithmetic too, int8 cache": _mode(dtype="bfloat16", cache_dtype="int8"),
    "int8, int8 cache": _mode("int8", cache_dtype="int8"),
    "stored, bfloat16 cache": _mode("stored", cache_dtype="bfloat16"),
    "stored, int8 cache": _mode("stored", cache_dtype="int8"),
    "stored/int8, int8 cache": _mode("stored", activations="int8", cache_dtype="int8"),
}
CHUNK = 100  # tokens that are read at once, through a cache
ROWS = 64  # positions whose logits are looked at together


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="gemma3-270m")
    parser.add_argument("--text-file", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=list(MODES))
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    result = measure(asked.model, asked.text_file, asked.tokens, asked.modes)
    result["command"] = " ".join(["python -m gemma_jax.benchmarks.quality", *sys.argv[1:]])
    for name, row in result["modes"].items():
        print(name, json.dumps(row), file=sys.stderr)
    text = json.dumps(result, indent=1) + "\n"
    print(text) if asked.output is None else asked.output.write_text(text, "utf-8")


def measure(source: str, text_file: Path, tokens: int, modes: list[str]) -> dict[str, Any]:
    """All figures of one model and one text."""
    tokenizer = gj.load_tokenizer(source)
    ids = tokenizer.encode(text_file.read_text("utf-8")[: 8 * tokens], bos=True)[:tokens]
    exact = log_probs(gj.load_model(source, dtype="float32"), ids)
    rows: dict[str, Any] = {"float32": {"perplexity": _perplexity(exact, ids)}}
    for name in modes:
        model = gj.load_model(source, MODES[name])
        read = log_probs if MODES[name].cache_dtype is None else log_probs_through_cache
        rows[name] = compare(exact, read(model, ids), ids)
        rows[name]["weight_bytes"] = sum(map(array_bytes, jax.tree.leaves(model)))
    return {
        "model": source,
        "text": str(text_file),
        "tokens": len(ids),
        "jax": jax.__version__,
        "machine": machine_facts(),
        "modes": rows,
    }


def log_probs(model: gj.Gemma, ids: list[int]) -> np.ndarray:
    """float32 `[T - 1, V]`: of what comes after each token but the last, after all before it."""

    @jax.jit
    def run(model: gj.Gemma, ids_BT: jax.Array) -> jax.Array:
        return jax.nn.log_softmax(gj.forward(model, ids_BT).logits[0].astype(jnp.float32))

    return np.asarray(run(model, np.array([ids[:-1]], np.int32)))


def log_probs_through_cache(model: gj.Gemma, ids: list[int], chunk: int = CHUNK) -> np.ndarray:
    """What `log_probs` says, of a text that is read in chunks through the model's cache."""

    @partial(jax.jit, donate_argnames=("cache",))
    def run(model: gj.Gemma, batch: Batch, cache: Cache) -> tuple[jax.Array, Cache]:
        out = gj.forward(model, batch, cache=cache)
        return jax.nn.log_softmax(out.logits[0].astype(jnp.float32)), out.cache

    cache, read = empty_cache(model, 1, len(ids) + chunk), []
    for start in range(0, len(ids) - 1, chunk):
        part = ids[start : min(start + chunk, len(ids) - 1)]
        batch = Batch.padded([part], chunk, starts=[start])
        found_TV, cache = run(model, batch, cache)
        read.append(np.asarray(found_TV)[: len(part)])
    return np.concatenate(read)


def compare(exact_TV: np.ndarray, found_TV: np.ndarray, ids: list[int]) -> dict[str, float]:
    """Figures of one mode against the exact one."""
    divergence = 0.0
    for start in range(0, len(exact_TV), ROWS):
        exact, found = exact_TV[start : start + ROWS], found_TV[start : start + ROWS]
        divergence += float(np.sum(np.exp(exact) * (exact - found), dtype=np.float64))
    places = np.arange(len(exact_TV)), np.array(ids[1:])
    return {
        "perplexity": _perplexity(found_TV, ids),
        "kl": divergence / len(exact_TV),
        "same_best": float(np.mean(exact_TV.argmax(-1) == found_TV.argmax(-1))),
        "log_prob_change": float(np.mean(np.abs(exact_TV[places] - found_TV[places]))),
    }


def _perplexity(log_probs_TV: np.ndarray, ids: list[int]) -> float:
    chosen = log_probs_TV[np.arange(len(ids) - 1), np.array(ids[1:])]
    return float(np.exp(-np.mean(chosen, dtype=np.float64)))


if __name__ == "__main__":
    main()
