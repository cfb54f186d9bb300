"""The installed command, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("text", ["a", "a " * 40_000], ids=["at the end", "in the middle"])
def test_reader_that_leaves(talker, text):
    """As in `gemma-jax ... | head -1`: what a shell says of other programs, and no message."""
    reader, writer = os.pipe()
    os.close(reader)
    command = ("tokenize", text, "--model", talker)
    ran = shell(*command, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, b"")


COMPILE = """
from gemma_jax.cli import common
common.set_up_jax()
common.set_up_jax()
import jax
jax.jit(lambda x: x + 1)(1.0)
"""


def test_a_cache_that_cannot_be_is_one_line(tmp_path):
    """And no warning of JAX, however many programs are compiled."""
    (tmp_path / "file").write_text("")
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "file")}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    folder = tmp_path / "file" / "gemma-jax" / "xla"
    assert ran.returncode == 0
    assert ran.stderr == f"no cache at {folder} (Not a directory): every start compiles\n"


def test_shells_complete_commands_and_names():
    """What the script of `--install-completion` asks for."""
    environment = os.environ | {"_GEMMA_JAX_COMPLETE": "complete_bash"}

    def completed(words: str) -> list[str]:
        count = {"COMP_WORDS": f"gemma-jax {words}", "COMP_CWORD": str(len(words.split(" ")))}
        return shell(env=environment | count).stdout.decode().split()

    assert completed("sc") == ["score"]
    assert completed("generate --model gemma3n-e2") == ["gemma3n-e2b", "gemma3n-e2b-it"]
