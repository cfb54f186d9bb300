"""A Gemma 3 as llama.cpp's converter and `llama-quantize` write it (`data/quant`), Q4_0."""

import json

import numpy as np
import pytest
from parity.goldens import DATA, assert_close, case

import gemma_jax as gj
from gemma_checkpoints import describe, load_weights
from gemma_checkpoints.hf.config import config_from_hf

FILE = DATA / "quant" / "g3_q4_0.gguf"

pytest.importorskip("gguf", reason="the gguf extra is not installed")


def test_the_header_says_what_the_config_of_transformers_says():
    raw = json.loads((DATA / "quant" / "g3_q4_0_config.json").read_text())
    assert describe(FILE).config == config_from_hf(raw)


def test_logits():
    given, expected, tolerance = case("quant", "g3_q4_0")
    model = load_weights(FILE, dtype="float32", layout="scan")
    out = gj.forward(model, given["input_ids"].astype(np.int32), capture=("final_norm",))
    assert_close(out.logits, expected["logits"], tolerance["logits"])
    assert_close(out.captured["final_norm"], expected["final_norm"], tolerance["final_norm"])


def test_prompt():
    facts = json.loads((DATA / "quant" / "g3_q4_0.json").read_text())
    assert gj.load_tokenizer(str(FILE)).encode(facts["prompt"], bos=True) == facts["prompt_ids"]
