"""Continuations and rolling windows with the real Gemma 3 270M, as lm-eval scores them.

`data/scores270m.json` holds what transformers 5.24 computes in float32 from the file's dequantised
weights. Rounding moves a log-probability by 4e-5 at most; sums of many grow with their number.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from marks import nightly

import gemma_jax as gj
from gemma_jax.evaluation.answerer import Answerer

STORED = json.loads((Path(__file__).parent / "data" / "scores270m.json").read_text("utf-8"))
PAIRS, ROLLING = STORED["pairs"], STORED["rolling"]
TIE = 2e-3  # a margin below it may go either way


def sum_atol(tokens: int) -> float:
    return 1e-3 + 2e-5 * tokens


@pytest.fixture(scope="module")
def answerer(real_gguf):
    return Answerer(*gj.load(real_gguf), max_length=1024)


def test_token_ids(real_tokenizer):
    reader = SimpleNamespace(tokenizer=real_tokenizer)
    reader.encode = lambda text: Answerer.encode(reader, text)
    for pair in PAIRS:
        found = Answerer.encode_pair(reader, pair["context"], pair["continuation"])
        assert found == (pair["context_ids"], pair["continuation_ids"])


@pytest.mark.parametrize("every", [5, *nightly(1)])
def test_pairs(answerer, every):
    """All at once: of one context and of different ones, in few passes."""
    some = PAIRS[::every]
    pairs = [(pair["context_ids"], pair["continuation_ids"]) for pair in some]
    for pair, score in zip(some, gj.score_continuations(answerer.model, pairs), strict=True):
        np.testing.assert_allclose(score.log_probs, pair["token_logprobs"], rtol=0, atol=1e-3)
        assert pair["smallest_margin"] > TIE and score.greedy.all() == pair["is_greedy"]


@pytest.mark.nightly
def test_sums(answerer):
    asked = [SimpleNamespace(args=(pair["context"], pair["continuation"])) for pair in PAIRS]
    for pair, (total, greedy) in zip(PAIRS, answerer.loglikelihood(asked), strict=True):
        count = len(pair["token_logprobs"])
        assert total == pytest.approx(sum(pair["token_logprobs"]), abs=sum_atol(count))
        assert greedy == pair["is_greedy"]


@pytest.mark.nightly
@pytest.mark.parametrize("text", ROLLING, ids=lambda text: text["name"])
def test_rolling_windows(answerer, text):
    ids = answerer.encode(text["text"])
    assert ids[1:] == text["ids"]
    log_probs = gj.score(answerer.model, ids, window=text["window"])
    stored = text["token_logprobs_every_16th"]
    np.testing.assert_allclose(log_probs[::16], stored, rtol=0, atol=1e-3)
    assert log_probs.sum(dtype=np.float64) == pytest.approx(
        text["loglikelihood"], abs=sum_atol(len(text["ids"]))
    )
    total = answerer.loglikelihood_rolling([SimpleNamespace(args=(text["text"],))])[0]
    assert total == pytest.approx(text["loglikelihood"], abs=sum_atol(len(text["ids"])))
