"""`gemma-jax`: one file per command, thin over the library.

stdout carries results only; progress, warnings and errors go to stderr. Exit code 2 means wrong use
or input, 1 a failure, 3 that `plan` found no room, 141 that the reader of stdout left. A traceback
appears only with `--debug`.
"""

import gc
import os
import sys
import warnings


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script; always ends in `sys.exit`."""
    if sys.stdout is None:  # closed by the caller, as `>&-` does
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    # A start makes a million objects that stay; looking through them for garbage every 700 of them
    # is a twentieth of it.
    gc.set_threshold(100_000, 50, 100)
    from gemma_jax.cli.app import run

    if "--debug" not in sys.argv:
        warnings.showwarning = _in_one_line
    # Models write all of Unicode, whatever the locale; paths may hold bytes that are no text.
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    code = run(sys.argv[1:] if argv is None else argv)
    gc.disable()  # the interpreter would look through all of them again, to free what ends anyway
    gc.freeze()
    sys.exit(code)


def _in_one_line(message: Warning | str, *_, **__) -> None:
    """Shows a library's warning without the line of its source."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)
