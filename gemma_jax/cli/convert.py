"""`gemma-jax convert`: from one checkpoint format to another."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common, progress


class Format(StrEnum):
    hf = "hf"
    orbax = "orbax"


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Catalog name or path.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    to: Annotated[Format, typer.Option(help="Hugging Face folder, or Orbax folder of ours.")],
    dtype: Annotated[
        common.DType | None, typer.Option(help="Dtype to store. Default: as in the source.")
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave the vision tower behind.")
    ] = False,
) -> None:
    """Convert a checkpoint; DST appears whole or not at all."""
    common.set_up_jax()
    from gemma_checkpoints import load_model, resolve, save_hf, save_orbax

    path = resolve(source)
    with progress.loading() as bar:
        model = load_model(
            path,
            dtype=dtype and dtype.value,
            modalities=("text",) if text_only else None,
            progress=bar,
        )
    save = save_hf if to == Format.hf else save_orbax
    with progress.saving():
        save(model, target, source=path)
    print(target)
