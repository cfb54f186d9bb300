"""`gemma-jax score`."""

import json
import math

import jax
import numpy as np
import pytest
from parity.goldens import DATA
from safetensors.numpy import load_file


def test_log_probs_are_those_of_the_stored_logits(cli, mute, tmp_path):
    case = load_file(DATA / "g3_text" / "forward.safetensors")
    ids = case["in.input_ids"][0]
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    ran = cli("score", "--model", mute, "--token-ids", tmp_path / "ids.json", "--json")
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)
    expected = jax.nn.log_softmax(case["out.logits"][0])[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(told["log_probs"], expected, atol=1e-4)
    assert told["perplexity"] == pytest.approx(math.exp(-np.mean(expected)), rel=1e-4)


def test_narrower_caches_cost_a_little(cli, refused, mute, tmp_path):
    ids = load_file(DATA / "g3_text" / "forward.safetensors")["in.input_ids"][0].tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    words = ("score", "--model", mute, "--token-ids", tmp_path / "ids.json", "--json")
    wide, int8 = (
        np.array(json.loads(cli(*words, *more).out)["log_probs"])
        for more in ((), ("--cache-dtype", "int8"))
    )
    assert 0 < np.abs(int8 - wide).mean() < 0.02  # nats
    assert "'int4' is not one of" in refused(*words, "--cache-dtype", "int4")


def test_text_is_taken_as_it_is(cli, talker, tmp_path):
    (tmp_path / "text").write_bytes("Räksmörgås\r\n".encode())
    words = ("--model", talker, "--text-file", tmp_path / "text")
    told = json.loads(cli("score", *words, "--json").out)
    tokens = cli("tokenize", "Räksmörgås\r\n", "--bos", "--model", talker, "--json").out
    assert told["token_ids"] == json.loads(tokens)["token_ids"]
    assert f"{len(told['log_probs'])} tokens" in cli("score", *words).out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[2, 320]", "ids must lie in [0, 320)"),
        ("[2]", "at least two token ids"),
        ("[]", "at least two token ids"),
        ('[2, "a"]', "JSON list of integers"),
        ("[2, true]", "JSON list of integers"),
        ("[2,", "no JSON file"),
        (str([2] * 600), "600 tokens do not fit the context of 512"),
    ],
)
def test_wrong_ids(refused, mute, tmp_path, text, message):
    (tmp_path / "ids.json").write_text(text)
    assert message in refused("score", "--model", mute, "--token-ids", tmp_path / "ids.json")


def test_wrong_text(refused, talker, tmp_path):
    file = tmp_path / "text"
    words = ("score", "--model", talker, "--text-file", file)
    assert "does not exist" in refused(*words)
    file.write_bytes(b"")
    assert "is empty" in refused(*words)
    file.write_bytes(b"caf\xe9")
    assert "not valid UTF-8 at byte 3" in refused(*words)


def test_either_a_text_or_ids(refused, mute):
    assert "--text-file or --token-ids" in refused("score", "--model", mute)


def test_longer_texts_are_scored_in_windows(cli, refused, mute, tmp_path):
    """How is asked in evaluation/test_windows.py."""
    ids = np.random.default_rng(0).integers(4, 300, 600).tolist()
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    words = ("score", "--model", mute, "--token-ids", tmp_path / "ids.json")
    assert "; --stride 512 scores them in windows, as lm-eval does" in refused(*words)
    assert "--stride 513 must lie between 1 and 512" in refused(*words, "--stride", 513)
    assert "--stride" in refused(*words, "--stride", 0)
    told = json.loads(cli(*words, "--stride", 512, "--json").out)
    assert len(told["log_probs"]) == 599
    mean = np.mean(told["log_probs"])
    assert told["mean_log_prob"] == pytest.approx(mean, rel=1e-6)
    assert told["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-6)
    assert "599 tokens, mean log-probability" in cli(*words, "--stride", 512).out
