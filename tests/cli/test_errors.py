"""Wrong use, broken checkpoints, and failures: one clear line each, whatever the command."""

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_imports import ROOT

from gemma_jax.cli import generate
from gemma_jax.cli.app import app, run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "no such command 'nothing'"),
        (["info"], "missing argument 'SRC'"),
        (["info", "a", "b"], "unexpected extra argument"),
        (["generate", "hi", "--nothing"], "no such option: --nothing"),
        (["generate", "hi", "--temperature"], "--temperature"),
        (["forward"], "missing option '--model'"),
    ],
)
def test_wrong_use(refused, words, message):
    assert message in refused(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate"], "give a PROMPT or --inputs FILE, one of the two"),
        (
            ["generate", "hi", "--dtype", "float8"],
            "--dtype: 'float8' is not one of 'float32', 'bfloat16', 'float16'",
        ),
        (
            ["convert", "a", "b", "--to", "gguf"],
            "--to: 'gguf' is not one of 'hf', 'orbax'",
        ),
    ],
)
def test_all_errors_have_one_style(refused, words, message):
    """The option if it is one, a colon, what is wrong: no prefix, no full stop."""
    assert refused(*words) == message


@pytest.mark.parametrize("command", [["generate", "hi"], ["score", "--text-file", __file__]])
@pytest.mark.parametrize("name", ["README.md", "notebooks"])
def test_what_is_no_checkpoint_is_called_so(refused, command, name):
    error = refused(*command, "--model", ROOT / name)
    assert error.startswith(f"{ROOT / name}: not a checkpoint: expected a .gguf file")


def test_bench_and_plan_take_no_processes(refused):
    for command in (["bench"], ["plan", "gemma3-1b", "--topology", "gpu:t4", "--context", "16"]):
        error = refused(*command, "--coordinator", "localhost:1", "--num-processes", "2",
                        "--process-id", "0")  # fmt: skip
        assert error.startswith(f"--coordinator: {command[0]} ") and error.endswith("leave it out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gemma3-270", "did you mean gemma3-270m"),
        ("gpt", "known models: gemma3-270m"),
        ("nowhere/model.gguf", "no such file or folder"),
    ],
)
def test_unknown_model(refused, name, message):
    for command in (["info"], ["generate", "hi", "--model"], ["tokenize", "hi", "--model"]):
        assert message in refused(*command, name)


def test_folder_without_config(refused, copy):
    (copy / "config.json").unlink()
    assert "not a checkpoint: expected a .gguf file" in refused("info", copy)


@pytest.fixture
def broken(copy, stored, refused):
    """`broken(change)`: the error of running `copy` after `change(tensors)`."""
    file = copy / "model.safetensors"

    def call(change) -> str:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return refused("generate", "--inputs", stored(input_ids=[[2]]), "--model", copy)

    return call


NORM, UP = "model.norm.weight", "model.layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), "is missing"),
        (lambda t: t.update({"model.more": t[NORM].copy()}), "is surplus"),
        (lambda t: t.update({NORM: np.zeros(71, np.float32)}), "has shape [71]"),
        (lambda t: t.update({NORM: np.zeros(72, np.int32)}), "is stored as I32"),
        (lambda t: t.update({NORM: np.full(72, np.nan, np.float32)}), "72 values are NaN"),
    ],
)
def test_wrong_tensors(broken, change, message):
    assert message in broken(change)


def test_several_problems_share_the_line(broken):
    error = broken(lambda t: (t.pop(UP), t.pop(NORM)))
    assert "2 problems: " in error and error.count("is missing") == 2


@pytest.mark.parametrize("size", [0, 7, 100, 50_000, -1])
def test_truncated_safetensors(refused, copy, stored, size):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    error = refused("generate", "--inputs", stored(input_ids=[[2]]), "--model", copy)
    assert "model.safetensors" in error


def test_flipped_bit_in_a_header(refused, copy, stored):
    file = copy / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[6] ^= 1  # of the header's length
    file.write_bytes(data)
    error = refused("generate", "--inputs", stored(input_ids=[[2]]), "--model", copy)
    assert "model.safetensors" in error


@pytest.mark.parametrize("size", [4, 30, 1_000, 100_000])
def test_truncated_gguf(refused, real_gguf, tmp_path, size):
    with open(real_gguf, "rb") as file:
        (tmp_path / "cut.gguf").write_bytes(file.read(size))
    assert "cut.gguf" in refused("info", tmp_path / "cut.gguf")
    assert "cut.gguf" in refused("generate", "hi", "--model", tmp_path / "cut.gguf")


def test_forged_gguf_count(refused, tmp_path):
    (tmp_path / "forged.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 1 << 60))
    assert "forged.gguf" in refused("info", tmp_path / "forged.gguf")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "llama"}'])
def test_broken_config(refused, copy, text):
    (copy / "config.json").write_text(text)
    assert "config.json" in refused("info", copy)


def test_broken_tokenizer(refused, talker, tmp_path):
    shutil.copytree(talker, tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff")
    assert "tokenizer.model" in refused("tokenize", "a", "--model", tmp_path / "hf")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("one\n  two\n\n  three"), 2, "error: one: two; three"),
        (ValueError("x" * 5000), 2, "error: " + "x" * 2000 + " ..."),
        (RuntimeError("odd"), 1, "error: RuntimeError: odd (--debug shows where)"),
        (AssertionError(), 1, "error: AssertionError: no message (--debug shows where)"),
        (MemoryError(), 1, "error: out of memory; try"),
        (RuntimeError("RESOURCE_EXHAUSTED: 9 GB"), 1, "error: out of memory; try"),
        (PermissionError(13, "Permission denied", "f"), 1, "error: Permission denied: f"),
        (FileNotFoundError(2, "No such file", "f"), 2, "error: No such file: f"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_exception_is_a_line(monkeypatch, capsys, error, code, line):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("gemma_jax.loading.load_tokenizer", fail)
    assert run(["tokenize", "hi"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line) and err.count("\n") <= 1


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="did you mean"):
        run(["info", "gemma3-270", "--debug"])


@pytest.mark.parametrize("help_", [[], ["--help"], ["generate", "-h"]])
def test_help_goes_to_stdout(cli, help_):
    ran = cli(*help_)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("Usage: gemma-jax")


def test_every_command_is_there(cli):
    names = {info.name for info in (*app.registered_commands, *app.registered_groups)}
    assert names >= {"generate", "chat", "score", "forward", "tokenize", "info", "convert", "bench"}
    assert all(f"  {name} " in cli("--help").out for name in names)
    assert json.dumps(generate.command.__doc__)  # the text of its help
