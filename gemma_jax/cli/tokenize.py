"""`gemma-jax tokenize`: text to token ids."""

from typing import Annotated

import typer

from gemma_jax.cli import common
from gemma_jax.cli.inputs import utf8
from gemma_jax.cli.model_options import all_but, refuse_options


@refuse_options(all_but(because="tokenize reads no weights"))
def command(
    text: Annotated[str, typer.Argument(help="Text to encode.")],
    model: common.Model = "gemma3-270m",
    bos: Annotated[bool, typer.Option(help="Begin with BOS.")] = False,
    as_json: common.Json = False,
) -> None:
    """Token ids and pieces of TEXT, and what they decode to."""
    from gemma_jax.loading import load_tokenizer

    text = text and utf8(text, "the text")
    tokenizer = load_tokenizer(model)
    ids = tokenizer.encode(text, bos=bos)
    pieces = tokenizer.pieces(ids)
    if as_json:
        decoded = tokenizer.decode(ids)
        common.print_json({"token_ids": ids, "pieces": pieces, "decoded": decoded})
    else:
        for i, piece in zip(ids, pieces):
            print(f"{i:>7}  {piece!r}")
