"""`gemma-jax slice`: cut a smaller model out of a MatFormer."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.errors import flags_for
from gemma_jax.cli.model_options import DType, all_but, refuse_options


@refuse_options(all_but("dtype", because="slice runs no model"))
def command(
    source: common.Source,
    target: Annotated[Path, typer.Argument(metavar="DST", help="New Hugging Face folder.")],
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Published slice (e2b, e2.54b, ...), or JSON file."),
    ] = None,
    ffn_widths: Annotated[
        str | None,
        typer.Option(
            metavar="W|W0,W1,...",
            help="Width of all kept layers, or of each. Default: as they are.",
        ),
    ] = None,
    skip_layers: Annotated[
        str | None, typer.Option(metavar="I,J,...", help="Layers to leave out. Default: none.")
    ] = None,
    allow_irregular: Annotated[
        bool,
        typer.Option("--allow-irregular", help="Let single layers be skipped, not only blocks."),
    ] = False,
    dtype: Annotated[
        DType | None, typer.Option(help="Dtype to store. Default: as in the source.")
    ] = None,
) -> None:
    """Write a slice as a Hugging Face folder of its own; DST appears whole or not at all.

    Towers of images and sounds go along as they are.
    """
    numbers = ffn_widths is not None or skip_layers is not None
    if (preset is not None) == numbers:
        raise typer.BadParameter("give --preset, or --ffn-widths and --skip-layers, one of the two")
    from gemma_checkpoints import describe, resolve

    path = resolve(source)
    cfg = describe(path).config
    from gemma_jax.matformer import Slice, slice_config, slice_model

    if preset is not None:
        submodel = common.find_slice(preset, source)
    else:
        widths = None if ffn_widths is None else _numbers(ffn_widths, "--ffn-widths")
        submodel = Slice(
            ffn_widths=widths[0] if widths and len(widths) == 1 else widths,
            skip_layers=_numbers(skip_layers, "--skip-layers"),
        )
    with flags_for("allow_irregular"):
        slice_config(cfg, submodel, allow_irregular=allow_irregular)  # before any weight is read
    common.set_up_jax()
    from gemma_checkpoints import load_weights, save_hf

    with progress.loading() as bar:
        model = load_weights(path, dtype=dtype and dtype.value, layout="unrolled", progress=bar)
    small = slice_model(model, submodel, allow_irregular=allow_irregular)
    with progress.saving():
        save_hf(small, target, source=path)
    print(target)


def _numbers(text: str | None, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"{option} {text!r} must be whole numbers, like 0,1,2") from None
