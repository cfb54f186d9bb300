"""The installed command, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DATA

COMMAND = Path(sys.executable).parent / "gemma-jax"


def shell(*words, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "timeout": 300, **options}
    return subprocess.run([COMMAND, *map(str, words)], **options)


def test_results_on_stdout_alone(talker):
    ran = shell("generate", "-", "--model", talker, "--max-new-tokens", 3, input=b"capital")
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.strip()


def test_wrong_use_is_one_line():
    for words in (["generate", b"caf\xe9".decode("utf-8", "surrogateescape")], ["info", "gpt"]):
        ran = shell(*words, "--model" if len(words) > 9 else "--json")
        assert (ran.returncode, ran.stdout) == (2, b"")
        assert ran.stderr.startswith(b"error: ") and ran.stderr.count(b"\n") == 1


def test_unicode_whatever_the_locale(talker):
    environment = os.environ | {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ran = shell("tokenize", "smörgås", "--model", talker, "--json", env=environment)
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert json.loads(ran.stdout)["decoded"] == "smörgås"


def test_reader_that_leaves(talker):
    """As in `gemma-jax ... | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    ran = shell("tokenize", "a", "--model", talker, capture_output=False, stdout=writer, stderr=-1)
    os.close(writer)
    assert ran.stderr == b""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_waiting_is_shown_on_a_terminal_and_wiped_away():
    """stderr is a terminal here, stdout a pipe."""
    ours, theirs = os.openpty()
    inputs = DATA / "g3_text" / "generate.safetensors"
    words = ("generate", "--inputs", inputs, "--model", DATA / "g3_text", "--max-new-tokens", 2)
    environment = os.environ | {"TERM": "xterm", "JAX_COMPILATION_CACHE_DIR": ""}
    ran = shell(*words, capture_output=False, stdout=-1, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while not seen.endswith(b"\x1b[2K"):  # rich's last word: the line is erased
        seen += os.read(ours, 1 << 16)
    os.close(ours)
    assert ran.returncode == 0
    assert b"compiling" in seen and b"Traceback" not in seen
    assert b"compiling" not in ran.stdout
