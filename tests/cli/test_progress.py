"""The bar on stderr."""

import io
from contextlib import redirect_stderr

import pytest

from gemma_jax.cli.progress import Bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def a_terminal_that_can_move(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")


def test_amounts_come_between_waits():
    with redirect_stderr(Terminal()) as terminal, Bar("reading", "tokens") as bar:
        bar._progress.refresh()
        assert "compiling" in terminal.getvalue()
        bar(2_000, 4_000)
        bar._progress.refresh()
        assert "reading, 2,000 of 4,000 tokens" in terminal.getvalue()
        bar(4_000, 4_000)
        bar._progress.refresh()
        assert terminal.getvalue().rindex("compiling") > terminal.getvalue().rindex("reading")


def test_nothing_moves_once_text_flows():
    with redirect_stderr(Terminal()) as terminal, Bar("reading", "tokens") as bar:
        bar.stop()
        shown = terminal.getvalue()
        bar(1, 2)
    assert terminal.getvalue() == shown
    assert shown.endswith("\x1b[2K")  # the line is wiped away


def test_silent_where_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes rich think of any file as a terminal
    with Bar("reading", "tokens") as bar:
        bar(1, 2)
    assert capsys.readouterr() == ("", "")


def test_commands_wait_visibly(cli, talker):
    with redirect_stderr(Terminal()) as terminal:
        ran = cli("generate", "capital", "--model", talker, "--max-new-tokens", 2)
    assert (ran.code, ran.err) == (0, "")
    assert "loading weights" in terminal.getvalue()
    assert "compiling" in terminal.getvalue()
