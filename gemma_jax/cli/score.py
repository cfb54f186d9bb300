"""`gemma-jax score`: how probable a text is."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common


def command(
    model: common.Model = "gemma3-270m",
    text_file: Annotated[Path | None, typer.Option(help="UTF-8 text; BOS is added.")] = None,
    token_ids: Annotated[
        Path | None, typer.Option(help="JSON list of token ids, taken as it is.")
    ] = None,
    dtype: common.DTypeOption = None,
    weights: common.WeightsOption = None,
    numerics: common.NumericsOption = common.NumericsName.hf,
    attention_impl: common.AttentionOption = None,
    as_json: common.Json = False,
) -> None:
    """Log-probability of every token of a text given those before it, and the perplexity."""
    if (text_file is None) == (token_ids is None):
        raise typer.BadParameter("give --text-file or --token-ids, one of the two")
    ids = _read_ids(token_ids) if token_ids else None
    text = _read_text(text_file) if text_file else None
    common.set_up_jax()
    from gemma_jax.loading import load_tokenizer
    from gemma_jax.scoring import score

    if ids is None:
        ids = load_tokenizer(model).encode(text, bos=True)
    net = common.load_model(
        model, dtype=dtype, weights=weights, numerics=numerics, attention_impl=attention_impl
    )
    with common.token_progress("scoring") as progress:
        log_probs = score(net, ids, progress=progress)
    mean = float(log_probs.mean())
    perplexity = math.exp(-mean) if -mean < 700 else math.inf
    if as_json:
        common.print_json(
            {
                "token_ids": ids,
                "log_probs": [float(x) for x in log_probs],
                "mean_log_prob": mean,
                "perplexity": perplexity,
            }
        )
    else:
        print(f"{len(log_probs)} tokens, mean log-probability {mean:.4f}, {perplexity=:.4f}")


def _read_text(path: Path) -> str:
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid UTF-8 at byte {error.start}; convert it") from None
    if not text:
        raise ValueError(f"{path} is empty; scoring needs some text")
    return text


def _read_ids(path: Path) -> list[int]:
    try:
        ids = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise ValueError(f"{path} must hold a JSON list of integers")
    return ids
