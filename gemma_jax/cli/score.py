"""`gemma-jax score`: how probable a text is."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.errors import flags_for
from gemma_jax.cli.inputs import utf8
from gemma_jax.cli.model_options import ModelOptions, model_options


@model_options()
def command(
    model: common.Model = "gemma3-270m",
    text_file: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="UTF-8 text; BOS is put in front."),
    ] = None,
    token_ids: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JSON list of token ids, taken as it is."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Score texts longer than the context in windows, N tokens in each; the context "
            "itself is lm-eval's way.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Read N tokens at once at most, in the place of the context; without --stride by "
            "the rule of lm-eval.",
        ),
    ] = None,
    *,
    options: ModelOptions,
    as_json: common.Json = False,
) -> None:
    """Measure how probable a text is.

    Log-probability (natural) of every token given those before it, and the perplexity.
    """
    if (text_file is None) == (token_ids is None):
        raise typer.BadParameter("give --text-file or --token-ids, one of the two")
    ids = _read_ids(token_ids) if token_ids else None
    text = utf8(text_file.read_bytes(), str(text_file)) if text_file else None
    common.set_up_jax()
    from gemma_jax.evaluation.scoring import score
    from gemma_jax.loading import load_tokenizer

    if ids is None:
        ids = load_tokenizer(model).encode(text, bos=True)
    gemma = options.load(model)
    with progress.reading() as bar, flags_for("stride", "window"):
        log_probs = score(gemma, ids, stride=stride, window=window, progress=bar)
    mean = float(log_probs.mean())
    perplexity = math.exp(-mean) if -mean < 700 else math.inf
    if as_json:
        result = {"token_ids": ids, "log_probs": log_probs.tolist()}
        common.print_json(result | {"mean_log_prob": mean, "perplexity": perplexity})
    else:
        print(f"{len(log_probs)} tokens, mean log-probability {mean:.4f}, {perplexity=:.4f}")


def _read_ids(path: Path) -> list[int]:
    try:
        ids = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"{path} must hold a JSON list of integers, such as [2, 818, 5279]")
    return ids
