"""Errors as one line for people, and whose fault they are."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Paths that a user got wrong; every other OSError is a failure of the machine.
WRONG_PATH = (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)


LONGEST = 2000  # characters of an error
NO_ROOM = 3  # exit code: the answer of `plan` is that a model does not fit


class NoRoomError(ValueError):
    """Says that nothing of what was asked for fits; no fault of anyone."""


def exit_code(error: Exception) -> int:
    """3 for an answer that is no, 2 for what the user can put right, 1 for a failure."""
    return NO_ROOM if isinstance(error, NoRoomError) else 2 if is_input_error(error) else 1


def is_input_error(error: Exception) -> bool:
    """Whether the user can put it right (exit code 2), or the machine or the program failed (1)."""
    if isinstance(error.__cause__, OSError):  # such as a disk that is full
        error = error.__cause__
    return _is_usage_error(error) or isinstance(error, (ValueError, ImportError, *WRONG_PATH))


@contextmanager
def flags_for(*names: str) -> Iterator[None]:
    """Lets errors of the library name options of a command in the place of arguments.

    `process_id=2` becomes `--process-id 2`, and `allow_irregular=True` `--allow-irregular`.
    """

    def flag(found: re.Match) -> str:
        return "--" + found[1].replace("_", "-") + (" " if found[2] == "=" else "")

    try:
        yield
    except ValueError as error:
        text = re.sub(rf"(?<!['\w])({'|'.join(names)})\b(=True\b|=)?", flag, str(error))
        raise ValueError(text) from error


def one_line(error: Exception) -> str:
    lines = [line.strip() for line in _message(error).splitlines() if line.strip()]
    text = lines[0] + (": " + "; ".join(lines[1:]) if lines[1:] else "")
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


def _message(error: Exception) -> str:
    if _is_usage_error(error):
        return _usage(" ".join(error.format_message().split()))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory; try a smaller model, --dtype bfloat16 or --weights int8"
    if (is_input_error(error) or isinstance(error, OSError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {str(error) or 'no message'} (--debug shows where)"


def _usage(text: str) -> str:
    """A message of typer in the words of ours: the option, a colon, what is wrong with it.

    `Invalid value for '--to': Value error, 'x' is not one of 'hf', 'orbax'.` becomes
    `--to: 'x' is not one of 'hf', 'orbax'`.
    """
    text = text.removeprefix("Invalid value: ").removesuffix(".")
    named = re.fullmatch(r"Invalid value for '?(.+?)'?: (?:Value error, )?(.+)", text)
    if named is None:
        return text[:1].lower() + text[1:]
    option = named[1].replace("' / '", " / ")
    return f"{option}: {named[2]}"


def _is_usage_error(error: Exception) -> bool:
    """Whether it is click's; duck-typed, as newer versions of typer bring a click of their own."""
    return hasattr(error, "format_message")
