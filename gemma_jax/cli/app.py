"""The commands, put together, and the one place where errors become lines."""

import os
import sys

import click
import typer

from gemma_jax.cli import chat, convert, forward, generate, info, score, tokenize

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Gemma in JAX: write, chat, score, inspect, convert.",
    epilog="SRC is a catalog name (gemma3-270m), a Hugging Face folder, a .gguf file, or an Orbax "
    "folder written by `gemma-jax convert`. --debug shows tracebacks.",
)
for module in (generate, chat, score, forward, tokenize, info, convert):
    app.command()(module.command)


def run(argv: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"]
    try:
        code = app(args=argv, prog_name="gemma-jax", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `gemma-jax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2 if _is_input_error(error) else 1


def _is_input_error(error: Exception) -> bool:
    wrong_path = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)
    return isinstance(error, (click.ClickException, ValueError, ImportError, *wrong_path))


def _one_line(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "out of memory; try a smaller model, --dtype bfloat16 or --weights int8"
    return str(error) or type(error).__name__
