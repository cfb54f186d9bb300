"""The real Gemma 3 270M (base, Q4_K_M) against transformers on the same weights.

`data/real270m.json` holds what transformers 5.23 computes in float32 from the file's dequantised
weights. Rounding moves a log-probability by 3e-5 at most, a wrong model by far more than 1e-3; a
greedy choice means something while its margin over the runner-up is larger than rounding.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from marks import nightly

import gemma_jax as gj

STORED = json.loads((Path(__file__).parent / "data" / "real270m.json").read_text("utf-8"))
PROMPTS = {prompt["name"]: prompt for prompt in STORED["prompts"]}
SHORT = [name for name, prompt in PROMPTS.items() if "greedy_ids" in prompt]
TIE = 2e-3  # a margin below it may go either way


@pytest.fixture(scope="module")
def model(real_gguf):
    return gj.load_model(real_gguf)


@pytest.fixture(scope="module")
def tokenizer(real_gguf):
    return gj.load_tokenizer(real_gguf)


@pytest.fixture(scope="module", params=[16, *nightly(48)])
def completions(model, tokenizer, request):
    """All short prompts continued as one batch: one program, and a test of ragged batches."""
    ids = [PROMPTS[name]["ids"] for name in SHORT]
    steps = request.param
    return dict(zip(SHORT, gj.generate(model, tokenizer, ids, max_new_tokens=steps, stop_ids=())))


@pytest.mark.parametrize("name", SHORT)
def test_token_ids(tokenizer, name):
    assert tokenizer.encode(PROMPTS[name]["text"], bos=True) == PROMPTS[name]["ids"]


@pytest.mark.parametrize(
    "name", [*SHORT, *nightly(*(name for name in PROMPTS if name not in SHORT))]
)
def test_log_probs(model, name):
    actual = gj.score(model, PROMPTS[name]["ids"])
    np.testing.assert_allclose(actual, PROMPTS[name]["token_logprobs"], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", SHORT)
def test_greedy_continuations(completions, name):
    stored, actual = PROMPTS[name], completions[name]
    ties = [i for i, margin in enumerate(stored["greedy_margins"]) if margin < TIE]
    sure = min(ties[0] if ties else 48, len(actual.token_ids))
    assert actual.token_ids[:sure] == stored["greedy_ids"][:sure]
    np.testing.assert_allclose(
        actual.log_probs[:sure], stored["greedy_logprobs"][:sure], rtol=0, atol=1e-3
    )


def test_text(completions, tokenizer):
    """The ids are decoded to the very text that Hugging Face's tokenizer makes of them."""
    for name in SHORT:
        assert tokenizer.decode(PROMPTS[name]["greedy_ids"]) == PROMPTS[name]["greedy_text"]
    said, whole = completions["english_fact"], PROMPTS["english_fact"]
    assert said.text == tokenizer.decode(whole["greedy_ids"][: len(said.token_ids)])
