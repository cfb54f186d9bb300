"""`gemma-jax quantise`."""

import json

import pytest

WORDS = ("--max-new-tokens", 4, "--json")


def text(cli, folder):
    return json.loads(cli("generate", "capital", "--model", folder, *WORDS).out)["text"]


def test_a_folder_in_8_bits_says_the_same(cli, talker, tmp_path):
    ran = cli("quantise", talker, tmp_path / "out", "--to", "int8:8")
    assert (ran.code, ran.out, ran.err) == (0, f"{tmp_path / 'out'}\n", "")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert text(cli, tmp_path / "out") == text(cli, talker)


def test_a_gguf_file_has_all_inside(cli, tmp_path):
    pytest.importorskip("gguf", reason="the gguf extra is not installed")
    out = tmp_path / "out.gguf"
    ran = cli("quantise", "checkpoints/digits", out, "--to", "gguf:q4_0")
    assert (ran.code, ran.out) == (0, f"{out}\n")
    assert ran.err == "out.gguf: the decoder alone; towers go into files of their own\n"
    said = json.loads(cli("info", out, "--json").out)
    assert said["format"] == "GGUF" and "Q4_0" in said["file_bytes_by_encoding"]
    assert cli("generate", "Which digit", "--model", out, *WORDS).code == 0


@pytest.mark.parametrize("to", ["gguf", "gguf:q3_k", "int5", "hf", "int4:0"])
def test_unknown_formats(refused, to, talker, tmp_path):
    said = refused("quantise", talker, tmp_path / "out", "--to", to)
    assert f"--to '{to}' is not one of gguf:q4_0, gguf:q8_0, gguf:q4_k_m, int4 or int8" in said


def test_targets_in_the_way(refused, talker, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    assert "not empty" in refused("quantise", talker, tmp_path / "taken", "--to", "int8:8")
    taken = tmp_path / "taken" / "mine"
    assert "exists already" in refused("quantise", talker, taken, "--to", "gguf:q8_0")
    assert taken.read_text() == "precious"
