"""`gemma-jax info`."""

import json
import socket

import pytest


def facts(cli, source) -> dict:
    ran = cli("info", source, "--json")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)


@pytest.mark.parametrize("name", ["gemma3-4b", "gemma3-4b-it", "gemma3-4b-pt"])
def test_preset(cli, name, no_network):
    told = facts(cli, name)
    assert told["parameters"] == 3_880_263_168
    assert (told["local_layers"], told["global_layers"], told["window"]) == (29, 5, 1024)
    assert list(told["cache_bytes_bfloat16"]) == ["1024", "8192", "32768", "131072"]


def test_folder(cli, mute):
    told = facts(cli, mute)
    assert told["format"] == "Hugging Face"
    assert told["file_bytes"] == 2 * told["parameters"] == told["file_bytes_by_encoding"]["BF16"]
    assert list(told["cache_bytes_bfloat16"]) == ["512"]  # its context


def test_table(cli, mute):
    out = cli("info", mute).out
    for words in ("parameters", "local layers", "cache at 512 tokens", "in the file as BF16"):
        assert words in out


def test_real_gguf(cli, real_gguf):
    told = facts(cli, real_gguf)
    assert (told["format"], told["parameters"]) == ("GGUF", 268_098_176)
    assert "Q4_K" in told["file_bytes_by_encoding"]
