"""A Gemma 3n as llama.cpp's converter and `llama-quantize` write it (`data/quant`), Q4_0."""

import json

import numpy as np
import pytest
from parity.goldens import DATA, assert_close, case

import gemma_jax as gj
from gemma_checkpoints import describe, load_weights, open_source, save_orbax
from gemma_checkpoints.hf.config import config_from_hf

FILE = DATA / "quant" / "g3n_q4_0.gguf"

pytest.importorskip("gguf", reason="the gguf extra is not installed")


@pytest.fixture(scope="module")
def model():
    return load_weights(FILE, dtype="float32", layout="scan")


def test_the_header_says_what_the_config_of_transformers_says():
    raw = json.loads((DATA / "quant" / "g3n_q4_0_config.json").read_text())
    assert describe(FILE).config == config_from_hf(raw)


def test_logits(model):
    """Some ids lie in the rows of zeros that fill the per-layer table up: they take row 0."""
    given, expected, tolerance = case("quant", "g3n_q4_0")
    ids = given["input_ids"].astype(np.int32)
    assert (ids >= model.cfg.per_layer.vocab_size).any()
    out = gj.forward(model, ids, capture=("final_norm",))
    assert_close(out.logits, expected["logits"], tolerance["logits"])
    assert_close(out.captured["final_norm"], expected["final_norm"], tolerance["final_norm"])


def test_prompt():
    facts = json.loads((DATA / "quant" / "g3n_q4_0.json").read_text())
    assert gj.load_tokenizer(str(FILE)).encode(facts["prompt"], bos=True) == facts["prompt_ids"]


def test_the_per_layer_table_may_stay_on_the_host(model):
    given, _, tolerance = case("quant", "g3n_q4_0")
    ids = given["input_ids"].astype(np.int32)
    host = load_weights(FILE, dtype="float32", layout="scan", per_layer_table="host")
    assert_close(gj.forward(host, ids).logits, gj.forward(model, ids).logits, tolerance["logits"])


def test_types_are_kept_apart():
    tensors = open_source(FILE).tensors
    assert tensors["altup_proj.weight[2]"].encoding == "F16"
    assert tensors["per_layer_token_embd.weight"].shape == (340, 320)
    assert {info.encoding for info in tensors.values()} == {"F16", "F32", "Q4_0", "Q8_0"}


def test_it_becomes_a_folder_of_ours(model, tmp_path):
    again = load_weights(save_orbax(model, tmp_path / "out"), dtype="float32", layout="scan")
    assert again.cfg == model.cfg
