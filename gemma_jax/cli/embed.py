"""`gemma-jax embed`: texts to vectors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.errors import flags_for
from gemma_jax.cli.inputs import utf8
from gemma_jax.cli.model_options import ModelOptions, model_options

if TYPE_CHECKING:
    from gemma_jax.decoder.model import Gemma


@dataclass(frozen=True)
class Text:
    """One text, and the name of its prompt if it has one of its own."""

    text: str
    prompt_name: str | None = None


EXPECTED = (
    "expected a JSON list of texts, or of objects with `text` and `prompt_name`, or an object that "
    "has such a list as `texts`; or a safetensors file with input_ids"
)


@model_options(
    refused={
        "cache_dtype": "embed keeps no cache",
        "vision_dtype": "embed is about text",
        "mmproj": "embed is about text",
    }
)
def command(
    model: common.Model,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT ...", help="Texts to embed.")
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Texts from a JSON file, or token ids from a safetensors file.",
        ),
    ] = None,
    prompt_name: Annotated[
        str | None,
        typer.Option("--prompt-name", "--task", help="Prompt of the model, such as query."),
    ] = None,
    dimensions: Annotated[
        int | None, typer.Option(min=1, help="Numbers of a vector to keep. Default: all.")
    ] = None,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut off texts that are too long.")
    ] = False,
    *,
    options: ModelOptions,
    as_json: common.Json = False,
) -> None:
    """Make one vector of every text.

    Of a sentence-transformers folder such as EmbeddingGemma's. Vectors have length one: their
    products are cosines. One line of numbers per text, or with --json `embeddings` and `token_ids`.
    """
    if bool(texts) == (inputs is not None):
        raise typer.BadParameter("give texts or --inputs, one of the two")
    given = [Text(utf8(text, "a text")) for text in texts or ()]
    rows = None
    if inputs is not None:
        given, rows = _read(inputs, prompt_name)
    common.set_up_jax()
    from gemma_jax.text_embedding.embed import embed_tokens

    gemma = options.load(model)
    with flags_for("dimensions", "truncate"):
        if rows is None:
            rows = _token_ids(gemma, model, given, prompt_name, truncate)
        with progress.embedding() as bar:
            vectors = embed_tokens(gemma, rows, dimensions=dimensions, progress=bar)
    if as_json:
        common.print_json({"embeddings": vectors.tolist(), "token_ids": rows})
    else:
        for vector in vectors:
            print(" ".join(f"{number:.6f}" for number in vector))


def _token_ids(
    model: "Gemma", source: str, texts: list[Text], prompt_name: str | None, truncate: bool
) -> list[list[int]]:
    from gemma_jax.loading import load_tokenizer
    from gemma_jax.text_embedding.embed import require_head, text_ids

    head, tokenizer = require_head(model), load_tokenizer(source)
    return [
        text_ids(model, tokenizer, one.text, head.prompt(one.prompt_name or prompt_name), truncate)
        for one in texts
    ]


def _read(path: Path, prompt_name: str | None) -> tuple[list[Text], list[list[int]] | None]:
    """Texts of a JSON file; or token ids of a safetensors file, which holds its header's length in
    eight bytes in front of a JSON object."""
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{" and b"\0" in head:  # which no JSON has
        if prompt_name is not None:
            raise ValueError(f"--prompt-name: {path} holds token ids, which have their prompt")
        return [], _read_ids(path)
    try:
        found = json.loads(utf8(path.read_bytes(), str(path)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    found = found.get("texts") if isinstance(found, dict) else found
    if not isinstance(found, list) or not found:
        raise ValueError(f"{path}: {EXPECTED}")
    return [_text(one, f"{path}, text {i}") for i, one in enumerate(found)], None


def _text(one: object, where: str) -> Text:
    if isinstance(one, str):
        return Text(one)
    text, name = (one.get("text"), one.get("prompt_name")) if isinstance(one, dict) else (None, 0)
    if not isinstance(text, str) or not isinstance(name, str | None):
        raise ValueError(f"{where}: {EXPECTED}")
    return Text(text, name)


def _read_ids(path: Path) -> list[list[int]]:
    from gemma_jax.cli.inputs import read_inputs, real_tokens

    arrays = read_inputs(path)
    if others := sorted(arrays.keys() - {"input_ids", "attention_mask"}):
        raise ValueError(f"{path}: embed cannot use {', '.join(others)}; leave them out")
    real = real_tokens(arrays, path)
    return [ids[mask].tolist() for ids, mask in zip(arrays["input_ids"], real)]
