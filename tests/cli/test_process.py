"""The installed command, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

COMMAND = Path(sys.executable).parent / "gemma-jax"


def shell(*words, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "timeout": 300, **options}
    return subprocess.run([COMMAND, *map(str, words)], **options)


def test_results_on_stdout_alone(talker):
    ran = shell("generate", "-", "--model", talker, "--max-new-tokens", 3, input=b"capital")
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.strip()


def test_wrong_use_is_one_line():
    for words in (["generate", "caf\udce9"], ["info", "gpt"], ["nothing"]):
        ran = shell(*words)
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
