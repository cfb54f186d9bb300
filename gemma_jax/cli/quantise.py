"""`gemma-jax quantise`: write a checkpoint with narrower weights, for this program or others."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.model_options import all_but, refuse_options

TARGETS = "gguf:q4_0, gguf:q8_0, gguf:q4_k_m, int4 or int8"


@refuse_options(all_but(because="quantise runs no model"))
def command(
    source: common.Source,
    target: Annotated[Path, typer.Argument(metavar="DST", help="New GGUF file, or new folder.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help=f"{TARGETS}. The last two are Hugging Face folders as compressed-tensors writes "
            "them, with a scale per 32 inputs or per output; int4:128, int8:32: per so many.",
        ),
    ],
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave the towers behind; GGUF files always do.")
    ] = False,
) -> None:
    """Write a checkpoint with weights of 4 or 8 bits; DST appears whole or not at all.

    A GGUF file is one that llama.cpp loads, with its vocabulary inside.
    """
    kind, _, mix = to.partition(":")
    from gemma_checkpoints.gguf.mix import MIXES
    from gemma_checkpoints.hf.compressed_out import Storage

    is_gguf = kind == "gguf"
    if is_gguf and mix not in MIXES:
        raise typer.BadParameter(f"--to {to!r} is not one of {TARGETS}")
    if not is_gguf:
        try:
            Storage.parse(to)
        except ValueError:
            raise typer.BadParameter(f"--to {to!r} is not one of {TARGETS}") from None
    common.set_up_jax()
    from gemma_checkpoints import load_weights, resolve, save_gguf, save_hf

    path = resolve(source)
    with progress.loading() as bar:
        model = load_weights(path, modalities=("text",) if text_only else None, progress=bar)
    with progress.saving():
        if is_gguf:
            save_gguf(model, target, mix, source=path)
        else:
            save_hf(model, target, weights=to, source=path)
    print(target)
