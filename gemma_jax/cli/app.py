"""The commands, put together, and the one place where errors become lines."""

import os
import sys
from typing import Annotated

import typer

from gemma_jax import __version__
from gemma_jax.cli import (
    bench,
    bench_kernels,
    chat,
    convert,
    embed,
    encode_audio,
    encode_image,
    evaluate,
    experiment,
    forward,
    generate,
    info,
    list_models,
    merge,
    plan,
    probe,
    quantise,
    score,
    serve,
    shield,
    slice,
    tokenize,
    train,
    transcribe,
)
from gemma_jax.cli.errors import exit_code, flags_for, one_line

app = typer.Typer(
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Gemma in JAX: write, chat, serve, score, embed, fine-tune, inspect, convert, quantise.",
    epilog="SRC is a catalog name (gemma3-270m), a Hugging Face folder, a .gguf file, or an Orbax "
    "folder written by `gemma-jax convert`. --debug, anywhere, shows tracebacks. --coordinator "
    "HOST:PORT --num-processes N --process-id I, anywhere, make this one of N processes that run "
    "the same command on all their devices; on a cluster that JAX knows, --multihost suffices.",
)
COMMANDS = (
    generate, chat, serve, score, embed, evaluate, probe, transcribe, shield, forward, tokenize,
    encode_image, encode_audio, info, convert, quantise, slice, merge, plan, train, experiment,
)  # fmt: skip
for module in COMMANDS:
    app.command(module.__name__.rpartition(".")[2].replace("_", "-"))(module.command)

app.command("list")(list_models.command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"gemma-jax {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version."),
    ] = False,
) -> None:
    """What may stand in front of a command."""


benches = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
benches.callback()(bench.command)
benches.command("kernels")(bench_kernels.command)
app.add_typer(benches, name="bench")

PROCESSES = ("--coordinator", "--num-processes", "--process-id")
ALONE = {
    "bench": "bench times processes of its own, which would join no others",
    "plan": "plan is about machines that need not be there",
}
READER_LEFT = 141  # what a shell says of a program that SIGPIPE ended


def run(argv: list[str]) -> int:
    """Runs one command line; returns the exit code."""
    debug = "--debug" in argv
    argv = [arg for arg in argv if arg != "--debug"] or ["--help"]
    try:
        argv = _join_processes(argv)
        code = app(args=argv, prog_name="gemma-jax", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.Exit as exit_:
        return exit_.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as in `gemma-jax ... | head -1`
        return _reader_left()
    except SystemExit as exit_:  # typer's answer to the same; it exits from nothing else
        if not isinstance(exit_.__context__, BrokenPipeError):
            raise
        return _reader_left()
    except Exception as error:
        if debug:
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        return exit_code(error)


def _reader_left() -> int:
    """Nobody wants the rest: Python shall not fail again when it flushes it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return READER_LEFT


def _join_processes(argv: list[str]) -> list[str]:
    """Takes the options for several processes out of a command line, and does what they say."""
    found: dict[str, str] = {}
    rest, words = [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in PROCESSES:
            found[name] = value if equals else next(words, "")
        elif word == "--multihost":
            found.setdefault(word, "")
        else:
            rest.append(word)
    if not found:
        return argv
    if (reason := ALONE.get(next((w for w in rest if not w.startswith("-")), ""))) is not None:
        raise ValueError(f"{next(iter(found))}: {reason}; leave it out")
    numbers = {name: found[name] for name in PROCESSES[1:] if name in found}
    if bad := [f"{name} {value}" for name, value in numbers.items() if not value.isdigit()]:
        raise ValueError(f"{', '.join(bad)}: expected a number")
    from gemma_jax import distributed as multihost

    numbers = [int(numbers[name]) if name in numbers else None for name in PROCESSES[1:]]
    with flags_for("coordinator", "num_processes", "process_id"):
        multihost.join(found.get(PROCESSES[0]), *numbers)
    return rest
