"""`gemma-jax chat`: talk to a model in the terminal."""

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.inputs import utf8


def command(
    model: common.Model = "gemma3-270m",
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    max_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens the conversation may take; default 8192.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Bound on each answer.")] = 1024,
    temperature: common.Temperature = 1.0,
    top_k: common.TopK = 64,
    top_p: common.TopP = 0.95,
    min_p: common.MinP = 0.0,
    seed: common.Seed = 0,
    dtype: common.DTypeOption = None,
    weights: common.WeightsOption = None,
) -> None:
    """Chat with a model; the cache is kept between turns.

    /reset starts anew, /quit or the end of input leaves. Ctrl-C stops an answer.
    """
    if system is not None:
        system = utf8(system, "--system")
    from gemma_jax.sampling import Sampling

    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    common.set_up_jax()
    from gemma_jax.generation import Conversation
    from gemma_jax.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    net = common.load_model(model, dtype=dtype, weights=weights)

    def start() -> Conversation:
        return Conversation(
            net, tokenizer, max_len=max_len, system=system, sampling=sampling, seed=seed
        )

    conversation = start()
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            conversation = start()
            continue
        try:
            _answer(conversation, line, max_new_tokens)
        except KeyboardInterrupt:
            print()  # what was written stays part of the conversation
        except ValueError as error:
            if not sys.stdin.isatty():
                raise
            print(f"error: {error}, or /reset", file=sys.stderr)  # outgrown: there is a way on


def _answer(conversation, line: str, max_new_tokens: int) -> None:
    with progress.compiling() as bar:
        for piece in conversation.stream(line, max_new_tokens=max_new_tokens):
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
