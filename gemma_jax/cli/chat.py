"""`gemma-jax chat`: talk to a model in the terminal."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.inputs import utf8
from gemma_jax.cli.model_options import ModelOptions, model_options

# Of the published checkpoints, for those that have no generation_config.json.
RECOMMENDED = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
ASKED = "As in `generate`. Default: as generation_config.json says, else {}."

if TYPE_CHECKING:
    from gemma_jax.decoder.model import Gemma
    from gemma_jax.inference.conversation import Conversation
    from gemma_jax.vision.images import Image


@model_options()
def command(
    model: common.Model = "gemma3-270m",
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    max_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens the conversation may take; default 8192.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Bound on each answer.")] = 1024,
    temperature: Annotated[float | None, typer.Option(help=ASKED.format("1"))] = None,
    top_k: Annotated[int | None, typer.Option(help=ASKED.format("64"))] = None,
    top_p: Annotated[float | None, typer.Option(help=ASKED.format("0.95"))] = None,
    min_p: Annotated[float | None, typer.Option(help=ASKED.format("0"))] = None,
    seed: common.Seed = 0,
    *,
    options: ModelOptions,
    pan_and_scan: common.PanAndScanOption = None,
) -> None:
    """Chat with a model; the cache is kept between turns.

    /image FILE puts an image in front of the next message, /reset starts anew, /quit or the end of
    input leaves. Ctrl-C stops an answer.
    """
    if system is not None:
        system = utf8(system, "--system")
    from gemma_jax.inference.sampling import Sampling

    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {name: value for name, value in given.items() if value is not None}
    Sampling(**given)  # refused before anything is loaded
    common.set_up_jax()
    from gemma_jax.inference.conversation import Conversation
    from gemma_jax.loading import load_sampling, load_tokenizer

    sampling = replace(load_sampling(model) or Sampling(**RECOMMENDED), **given)
    tokenizer = load_tokenizer(model)
    gemma = options.load(model)

    def start() -> Conversation:
        return Conversation(
            gemma,
            tokenizer,
            max_len=max_len,
            system=system,
            sampling=sampling,
            seed=seed,
            pan_and_scan=pan_and_scan,
        )

    conversation, images = start(), []
    for line in _lines():
        word, _, rest = line.partition(" ")
        if line == "/quit":
            return
        if line == "/reset":
            conversation, images = start(), []
        elif word == "/image":
            with _lenient():
                images.append(_open(rest.strip(), gemma))
        else:
            with _lenient(", or /reset"):  # the conversation may have outgrown its room
                content = [*images, line] if images else line
                _answer(conversation, content, max_new_tokens)
            images = []


@contextmanager
def _lenient(way_on: str = "") -> Iterator[None]:
    """Lets the chat go on after Ctrl-C, and on a terminal after an error, which becomes a line."""
    from gemma_jax.cli.errors import one_line

    try:
        yield
    except KeyboardInterrupt:
        print()  # what was written stays part of the conversation
    except (ValueError, OSError, ImportError) as error:
        if not sys.stdin.isatty():
            raise
        print(f"error: {one_line(error)}{way_on}", file=sys.stderr)


def _open(file: str, model: "Gemma") -> "Image":
    """The image for the next message."""
    from gemma_jax.multimodal.image_prompt import require_vision
    from gemma_jax.vision.images import Image

    require_vision(model.cfg.vision)
    if not file:
        raise ValueError("expected a file, as in /image picture.png")
    image = Image(os.path.expanduser(file))
    size = f"{image.width} x {image.height} pixels"
    print(f"{file}, {size}, goes with your next message", file=sys.stderr)
    return image


def _answer(conversation: "Conversation", content: "str | list", max_new_tokens: int) -> None:
    with progress.compiling() as bar:
        for piece in conversation.stream(content, max_new_tokens=max_new_tokens):
            bar.stop()
            sys.stdout.write(piece)
            sys.stdout.flush()
    print()


def _lines() -> Iterator[str]:
    """Non-empty lines the user enters, with a prompt where it is a terminal."""
    prompt = "\n> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise ValueError(f"what was entered is not valid UTF-8: {error.reason}") from None
        if line:
            yield utf8(line, "what was entered")
