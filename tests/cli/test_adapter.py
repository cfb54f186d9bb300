"""Adapters on the command line."""

import json

import numpy as np
import pytest
from parity.goldens import DATA
from safetensors.numpy import load_file, save_file

import gemma_jax as gj

FOLDER = DATA / "adapters"
TEXT, SEES = FOLDER / "g3_text_embedding", FOLDER / "g3_mm_plain_by_name"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    file = tmp_path_factory.mktemp("inputs") / "in.safetensors"
    save_file({"input_ids": np.array([[2, 5, 7, 100, 33, 12]])}, file)
    return file


def logits(cli, inputs, file, *options):
    ran = cli("forward", "--inputs", inputs, "--output", file, *options)
    assert ran.code == 0, ran.err
    return load_file(file)["logits"]


def test_forward_with_an_adapter_and_with_what_merge_made(cli, inputs, tmp_path):
    """The head is not adapted, and comes out of `merge` as one of its own."""
    base = ("--model", DATA / "g3_text")
    adapted = logits(cli, inputs, tmp_path / "a.safetensors", *base, "--adapter", TEXT)
    model = gj.load_adapter(gj.load_model(str(DATA / "g3_text"), dtype="float32"), TEXT)
    ids = np.array([[2, 5, 7, 100, 33, 12]])
    np.testing.assert_allclose(adapted, gj.forward(model, ids).logits, atol=1e-5)
    assert np.abs(adapted - logits(cli, inputs, tmp_path / "b.safetensors", *base)).max() > 1
    for to in ("hf", "orbax"):
        words = (DATA / "g3_text", TEXT, tmp_path / to, "--to", to, "--dtype", "float32")
        ran = cli("merge", *words)
        assert (ran.code, ran.out) == (0, f"{tmp_path / to}\n"), ran.err
        merged = logits(cli, inputs, tmp_path / f"{to}.safetensors", "--model", tmp_path / to)
        np.testing.assert_allclose(merged, adapted, atol=1e-4)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_generate_and_score_take_an_adapter(cli, inputs, tmp_path):
    base = ("--model", DATA / "g3_text", "--adapter", TEXT)
    ran = cli("generate", "--inputs", inputs, "--max-new-tokens", "3", "--json", *base)
    assert ran.code == 0, ran.err
    model = gj.load_adapter(gj.load_model(str(DATA / "g3_text"), dtype="float32"), TEXT)
    wanted = gj.generate(model, None, [2, 5, 7, 100, 33, 12], max_new_tokens=3).token_ids
    assert json.loads(ran.out)["token_ids"] in (wanted, [wanted])
    (tmp_path / "ids.json").write_text("[2, 5, 7, 100, 33, 12]")
    ran = cli("score", "--token-ids", tmp_path / "ids.json", "--json", *base)
    scores = gj.score(model, [2, 5, 7, 100, 33, 12])
    np.testing.assert_allclose(json.loads(ran.out)["log_probs"], scores, atol=1e-4)


def test_who_asks_for_text_alone_leaves_what_towers_have(cli, refused, inputs, tmp_path):
    base = ("--model", DATA / "g3_mm", "--adapter", SEES)
    logits(cli, inputs, tmp_path / "a.safetensors", *base, "--modalities", "text")
    error = refused("forward", "--inputs", inputs, "--output", tmp_path / "b.safetensors",
                    "--model", DATA / "g3_text", "--adapter", SEES)  # fmt: skip
    assert "more are for the image tower, which this model does not have" in error


def test_what_is_no_adapter_is_refused_in_a_line(refused, inputs, tmp_path):
    forward = ("forward", "--inputs", inputs, "--output", tmp_path / "o", "--model")
    error = refused(*forward, DATA / "g3_text", "--adapter", tmp_path)
    assert error == f"{tmp_path}: no PEFT adapter: adapter_config.json is missing"
    assert not (tmp_path / "o").exists()
    error = refused("merge", DATA / "g3_text", tmp_path, tmp_path / "new")
    assert "no PEFT adapter" in error and not (tmp_path / "new").exists()
    error = refused("merge", DATA / "g3_text", TEXT, tmp_path / "new", "--adapter", "x")
    assert error == "--adapter: merge takes the folder behind the source; leave it out"
