"""`gemma-jax embed`: texts to vectors, as the library makes them."""

import json

import numpy as np
import pytest
from parity.goldens import DATA
from safetensors.numpy import load_file, save_file

FOLDER = DATA / "embedding" / "tiny"
STORED = DATA / "embedding" / "embeddings.json"
ARRAYS = load_file(STORED.with_suffix(".safetensors"))
FACTS = json.loads(STORED.read_text())
TOLERANCE = FACTS["suggested_atol"]["embedding"]


def assert_stored(vectors, numbers, suffix=""):
    for i, vector in zip(numbers, vectors, strict=True):
        expected = ARRAYS[f"out.embedding_{i}{suffix}"]
        assert np.abs(np.asarray(vector, np.float32) - expected).max() <= TOLERANCE


def test_texts_of_the_command_line(cli):
    ran = cli(
        "embed", FACTS["texts"][0]["text"], FACTS["texts"][1]["text"], "--model", FOLDER,
        "--prompt-name", "query", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert_stored(result["embeddings"], (0, 1))
    assert result["token_ids"] == [FACTS["texts"][i]["ids"] for i in (0, 1)]


def test_texts_of_a_file_with_prompts_of_their_own(cli):
    ran = cli("embed", "--inputs", STORED, "--model", FOLDER, "--dimensions", 256, "--json")
    assert ran.code == 0, ran.err
    assert_stored(json.loads(ran.out)["embeddings"], range(8), "_256")


def test_token_ids_of_a_file(cli, tmp_path):
    rows = [ARRAYS[f"in.ids_{i}"] for i in (6, 7)]
    ids = np.full((2, len(rows[0])), 9)
    mask = np.zeros_like(ids)
    for b, row in enumerate(rows):
        ids[b, -len(row) :], mask[b, -len(row) :] = row, 1
    save_file({"in.input_ids": ids, "in.attention_mask": mask}, tmp_path / "in.safetensors")
    ran = cli("embed", "--inputs", tmp_path / "in.safetensors", "--model", FOLDER, "--json")
    assert ran.code == 0, ran.err
    result = json.loads(ran.out)
    assert_stored(result["embeddings"], (6, 7))
    assert result["token_ids"] == [row.tolist() for row in rows]


def test_a_line_of_numbers_per_text(cli):
    ran = cli("embed", "x", "--model", FOLDER, "--dimensions", 128)
    assert ran.code == 0, ran.err
    (line,) = ran.out.splitlines()
    expected = ARRAYS["out.embedding_7_128"]
    np.testing.assert_allclose([float(word) for word in line.split()], expected, atol=1e-6)


def test_forward_runs_the_decoder_of_such_a_folder(cli, tmp_path):
    ids = ARRAYS["in.ids_0"][None]
    save_file({"in.input_ids": ids}, tmp_path / "in.safetensors")
    ran = cli(
        "forward", "--model", FOLDER, "--inputs", tmp_path / "in.safetensors",
        "--output", tmp_path / "out.safetensors", "--capture", "final_norm,layer_outputs",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    out = load_file(tmp_path / "out.safetensors")
    assert out["layer_outputs"].shape == (7, 1, len(ids[0]), 48)
    pooled = out["final_norm"][0].mean(axis=0)
    assert np.abs(pooled - ARRAYS["out.pooled_0"]).max() <= FACTS["suggested_atol"]["pooled"]


def test_info_counts_the_head(cli):
    ran = cli("info", "embeddinggemma-300m", "--json")
    assert ran.code == 0, ran.err
    facts = json.loads(ran.out)
    assert facts["parameters"] == 307_581_696
    assert facts["text_parameters"] == 302_863_104
    assert not any(facts["cache_bytes_bfloat16"].values()), "it has no cache"
    assert "307.6 M" in cli("info", "embeddinggemma-300m").out


WRONG = [
    ((), "give texts or --inputs, one of the two"),
    (("x", "--inputs", STORED), "give texts or --inputs, one of the two"),
    (("x", "--prompt-name", "querry"), "did you mean 'query'"),
    (("x", "--dimensions", "769"), "--dimensions 769 must be a whole number in [1, 768]"),
    (("word " * 300,), "--truncate"),
    (("",), "a text is empty"),
    (("--inputs", DATA / "g3_text" / "config.json"), "expected a JSON list of texts"),
    (("--inputs", FOLDER / "tokenizer.model"), "tokenizer.model"),
    (("--inputs", DATA / "g3_text" / "forward.safetensors", "--task", "query"), "--prompt-name"),
    (("--inputs", FOLDER / "model.safetensors"), "cannot use"),
]


@pytest.mark.parametrize("words, message", WRONG)
def test_wrong_use_is_one_line(refused, words, message):
    assert message in refused("embed", *words, "--model", FOLDER)


def test_other_models_and_other_commands(refused, talker):
    assert "no pooling and no dense layers" in refused("embed", "x", "--model", talker)
    for words in (
        ("generate", "x"),
        ("score", "--text-file", FOLDER / "sentence_bert_config.json"),
    ):
        assert "gj.embed" in refused(*words, "--model", FOLDER)
