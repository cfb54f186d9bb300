"""The figures of narrower weights, and what the stored ones say."""

import json
from pathlib import Path

import numpy as np
import pytest

import gemma_jax as gj
from gemma_jax.benchmarks import quality

RESULT = Path(quality.__file__).parent / "results" / "quality-270m.json"


def test_figures_of_a_model_against_itself_and_against_a_rounded_one():
    model, tok = gj.load("checkpoints/digits", modalities=("text",))
    ids = tok.encode("Which digit is left? The left one is 7.", bos=True)
    exact = quality.log_probs(model, ids)
    same = quality.compare(exact, exact, ids)
    assert same["perplexity"] == pytest.approx(np.exp(-gj.score(model, ids).mean()), rel=1e-4)
    assert (same["kl"], same["same_best"], same["log_prob_change"]) == (0, 1, 0)
    rounded = [
        quality.compare(exact, quality.log_probs(gj.quantise(model, storage), ids), ids)["kl"]
        for storage in ("int8:32", "int4:32")
    ]
    assert 0 < 20 * rounded[0] < rounded[1] < 1


def test_a_text_that_is_read_through_the_cache():
    """In chunks of a size that does not divide the text; narrower caches change more."""
    ids = gj.load_tokenizer("checkpoints/digits").encode("Which digit is left? The left one is 7.")
    found = {}
    for kept in ("float32", "bfloat16", "int8"):
        model = gj.load_model("checkpoints/digits", modalities=("text",), cache_dtype=kept)
        exact = quality.log_probs(model, ids)
        read = quality.log_probs_through_cache(model, ids, chunk=5)
        assert read.shape == exact.shape
        found[kept] = quality.compare(exact, read, ids)["log_prob_change"]
    assert found["float32"] < 1e-5 < found["bfloat16"] < found["int8"] < 0.1


def test_the_stored_figures():
    """Blocks that are kept change nothing, 8 bits little, 4 bits much: it was not trained so."""
    modes = json.loads(RESULT.read_text("utf-8"))["modes"]
    exact = modes["float32"]["perplexity"]
    assert abs(modes["stored"]["perplexity"] - exact) < 1e-4 and modes["stored"]["kl"] < 1e-6
    assert abs(modes["int8:32"]["perplexity"] - exact) < 0.05
    assert modes["int8"]["kl"] < 0.01 < 0.5 < modes["int4"]["kl"]
    assert modes["int4"]["weight_bytes"] < 0.63 * modes["int8"]["weight_bytes"]
