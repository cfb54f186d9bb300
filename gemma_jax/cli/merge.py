"""`gemma-jax merge`: a model with an adapter as a plain model."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.convert import Format
from gemma_jax.cli.model_options import DType, MmprojOption, all_but, refuse_options


@refuse_options(
    all_but("dtype", "mmproj", because="merge runs no model")
    | {"adapter": "merge takes the folder behind the source"}
)
def command(
    source: common.Source,
    folder: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="PEFT folder: LoRA, DoRA or rsLoRA.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    to: Annotated[
        Format, typer.Option(help="Hugging Face folder, or Orbax folder of ours.")
    ] = Format.hf,
    dtype: Annotated[
        DType | None, typer.Option(help="Dtype to store. Default: as in the source.")
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave towers behind, and what adapts them.")
    ] = False,
    mmproj: MmprojOption = None,
) -> None:
    """Add an adapter to the weights of a model; DST appears whole or not at all.

    An adapter of the embedding alone gives the model a head of its own.
    """
    common.set_up_jax()
    from gemma_checkpoints import load_adapter, load_weights, resolve, save_hf, save_orbax
    from gemma_jax.adapters import merge

    path = resolve(source)
    with progress.loading() as bar:
        model = load_weights(
            path,
            dtype=dtype and dtype.value,
            modalities=("text",) if text_only else None,
            mmproj=mmproj,
            progress=bar,
        )
    merged = merge(load_adapter(model, folder, only_decoder=text_only))
    save = save_hf if to == Format.hf else save_orbax
    with progress.saving():
        save(merged, target, source=path)
    print(target)
