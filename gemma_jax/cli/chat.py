"""`gemma-jax chat`: talk to a model in the terminal."""

import sys
from typing import Annotated

import typer

from gemma_jax.cli import common


def command(
    model: common.Model = "gemma3-270m",
    system: Annotated[str | None, typer.Option(help="System text.")] = None,
    max_len: Annotated[
        int | None, typer.Option(help="Tokens the conversation may take; default 8192.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Bound on each answer.")] = 1024,
    temperature: Annotated[float, typer.Option(help="0 takes the most probable token.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep the k most probable tokens; 0 keeps all.")] = 64,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens of this mass.")] = 0.95,
    min_p: Annotated[float, typer.Option(help="Keep tokens this likely, next to the top.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the random choices.")] = 0,
    dtype: common.DTypeOption = None,
    weights: common.WeightsOption = None,
) -> None:
    """Chat with a model; the cache is kept between turns.

    /reset starts anew, /quit or the end of input leaves. Ctrl-C stops an answer.
    """
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
            for piece in conversation.stream(line, max_new_tokens=max_new_tokens):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pass  # what was written stays part of the conversation
        except ValueError as error:  # outgrown: the user may still /reset
            common.stderr.print(f"error: {error}", style="red", markup=False)
        print()


def _lines():
    """Non-empty lines the user enters, with a prompt where it is a terminal."""
    prompt = "\n> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line
