"""`gemma-jax convert`: from one checkpoint format to another."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.model_options import DType, MeshOption, MmprojOption, all_but, refuse_options


class Format(StrEnum):
    hf = "hf"
    orbax = "orbax"


@refuse_options(all_but("dtype", "mesh", "mmproj", because="convert runs no model"))
def command(
    source: common.Source,
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    to: Annotated[Format, typer.Option(help="Hugging Face folder, or Orbax folder of ours.")],
    dtype: Annotated[
        DType | None, typer.Option(help="Dtype to store. Default: as in the source.")
    ] = None,
    text_only: Annotated[
        bool, typer.Option("--text-only", help="Leave the vision tower behind.")
    ] = False,
    mesh: MeshOption = None,
    mmproj: MmprojOption = None,
) -> None:
    """Convert a checkpoint; DST appears whole or not at all.

    With --mesh no device holds the whole model; several processes write an Orbax folder together.
    """
    common.set_up_jax()
    from gemma_checkpoints import load_weights, resolve, save_hf, save_orbax
    from gemma_jax.loading import partition_for

    path = resolve(source)
    modalities = ("text",) if text_only else None
    partition = (
        None
        if mesh is None
        else partition_for(path, common.parse_mesh(mesh), modalities=modalities, mmproj=mmproj)
    )
    with progress.loading() as bar:
        model = load_weights(
            path,
            dtype=dtype and dtype.value,
            modalities=modalities,
            mmproj=mmproj,
            placement=partition and partition.placement,
            progress=bar,
        )
    save = save_hf if to == Format.hf else save_orbax
    with progress.saving():
        save(model, target, source=path)
    print(target)
