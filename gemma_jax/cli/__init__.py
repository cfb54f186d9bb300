"""`gemma-jax`: one file per command, thin over the library.

stdout carries results only; progress, warnings and errors go to stderr. Exit code 2 means wrong use
or input, 1 a failure. A traceback appears only with `--debug`.
"""

import os
import sys


def main(argv: list[str] | None = None) -> None:
    """Entry point of the console script; always ends in `sys.exit`."""
    if sys.stdout is None:  # closed by the caller, as `>&-` does
        sys.stdout = open(os.devnull, "w")
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    from gemma_jax.cli.app import run

    # Models write all of Unicode, whatever the locale; paths may hold bytes that are no text.
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    sys.exit(run(sys.argv[1:] if argv is None else argv))
