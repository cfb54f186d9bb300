"""`gemma-jax tokenize`."""

import json

import pytest


@pytest.mark.parametrize(
    "text", ["", " a  capital", "Räksmörgås 👍🏽\r\n", "<start_of_turn>user\n"]
)
def test_ids_decode_to_the_text(cli, talker, text):
    ran = cli("tokenize", text, "--model", talker, "--json")
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)
    assert told["decoded"] == text
    assert len(told["pieces"]) == len(told["token_ids"])


def test_table(cli, talker):
    ran = cli("tokenize", "of France", "--bos", "--model", talker)
    assert ran.out.splitlines()[0].split() == ["2", "'<bos>'"]


def test_text_that_is_no_utf8(refused, talker):
    assert "not valid UTF-8 at byte 1" in refused("tokenize", "a\udcff", "--model", talker)


def test_model_without_tokenizer(refused, mute):
    assert "no tokenizer found" in refused("tokenize", "a", "--model", mute)
