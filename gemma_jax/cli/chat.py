"""`gemma-jax chat`: talk to a model in the terminal."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_jax.cli import common
from gemma_jax.cli.chat_commands import COMMANDS, Chat, tell
from gemma_jax.cli.errors import flags_for
from gemma_jax.cli.inputs import utf8
from gemma_jax.cli.model_options import ModelOptions, model_options

# Of the published checkpoints, for those that have no generation_config.json.
RECOMMENDED = {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
ASKED = "As in `generate`. Default: as generation_config.json says, else {}."

if TYPE_CHECKING:
    from gemma_jax.text import Tokenizer


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

    /help lists what else may be said: /image FILE, /audio FILE, /temperature X, /save FILE, /reset,
    /quit. Ctrl-C stops an answer.
    """
    if system is not None:
        system = utf8(system, "--system")
    from gemma_jax.inference.sampling import Sampling

    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {name: value for name, value in given.items() if value is not None}
    with flags_for(*given):
        Sampling(**given)  # refused before anything is loaded
    common.set_up_jax()
    from gemma_jax.inference.conversation import Conversation
    from gemma_jax.loading import load_sampling, load_tokenizer

    sampling = replace(load_sampling(model) or Sampling(**RECOMMENDED), **given)
    tokenizer = load_tokenizer(model)
    gemma = options.for_writing().load(model)

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

    chat = Chat(start, max_new_tokens)
    if not was_trained_to_chat(model, tokenizer):
        tell(
            f"warning: nothing says that {model} was trained to chat; a base model continues text "
            "and is no assistant (gemma3-1b-it is one)"
        )
    if sys.stdin.isatty():
        tell(f"{model}: {', '.join(COMMANDS)}; Ctrl-C stops an answer")
    for line in _lines():
        if line.split()[0] == "/quit":
            return
        chat.enter(line)


def was_trained_to_chat(source: str, tokenizer: "Tokenizer") -> bool:
    """Whether a checkpoint says that it answers: by its name, or by what lies beside its weights.

    Names of the catalog say so by "-it", and so does the name of a file or folder ("it" or
    "instruct" as a part of it). Else a chat template says so, or <end_of_turn> among the stop ids
    of its files: transformers' conversion scripts write both for instruction-tuned models alone
    (5.24, `convert_gemma3_weights.py`, --include_chat_template).
    """
    from gemma_checkpoints import CATALOG, resolve, stated_in_json

    if source in CATALOG and not Path(source).exists():
        return source.endswith("-it")
    if {"it", "instruct"} & set(re.split(r"[^a-z0-9]+", Path(source).name.lower())):
        return True
    end_of_turn = tokenizer.special_ids.get("<end_of_turn>")
    stops = stated_in_json(resolve(source)).stop_ids or ()
    return tokenizer.chat_template is not None or end_of_turn in stops


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
