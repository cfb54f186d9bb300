"""`gemma-jax bench kernels`: attention alone, by the plan of a TPU's compiler, and its tiles."""

from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common


def command(
    chip: Annotated[
        list[str] | None, typer.Option(help="TPU to compile for; may be repeated. Default: all.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Shape of heads by name; may be repeated. Default: all."),
    ] = None,
    kind: Annotated[
        list[str] | None, typer.Option(help="forward or backward; may be repeated. Default: both.")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Try other tiles, and write the best into the table.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option(help="Table of tiles to write. Default: the package's own.")
    ] = None,
    as_json: common.Json = False,
) -> None:
    """Cycles that the TPU compiler plans for the attention kernels. Needs libtpu, but no TPU."""
    common.set_up_jax()
    from gemma_kernels.attention.tpu import blocks as tpu_blocks
    from gemma_kernels.attention.tpu import tuning
    from gemma_kernels.compilers.tpu_targets import CHIPS, one_device

    def chosen(what: str, given: list[str] | None, known) -> list[str]:
        for name in given or ():
            if name not in known:
                raise ValueError(f"unknown {what} {name!r}; choose from: {', '.join(known)}")
        return list(given or known)

    chips = chosen("TPU", chip, CHIPS)
    shapes = chosen("shape", shape, tuning.SHAPES)
    kinds = chosen("kind", kind, tuning.KINDS)
    if table is not None and not tune:
        raise ValueError("--table is what --tune writes; give both")
    one_device(chips[0])  # without libtpu it ends here, with one line
    rows = []
    with common.stderr().status("compiling") as status:
        for row in tuning.survey(chips, kinds, shapes, tune):
            rows.append(row)
            status.update(f"{row['chip']}, {row['kind']}, {row['shape']}: {row['useful']:.1%}")
    if tune:
        tuning.write_table(rows, table or tpu_blocks.TABLE)
    if as_json:
        common.print_json({"rows": rows})
    else:
        _print_table(rows)


def _print_table(rows: list[dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    view = Table(title="Attention on TPU as planned by its compiler, 8,192 tokens, bfloat16")
    for name in ("chip", "kernel", "shape", "tiles"):
        view.add_column(name)
    for name in ("matrix unit, useful share", "cycles", "of copies"):
        view.add_column(name, justify="right")
    for row in rows:
        tiles = " ".join(f"{name}={size}" for name, size in row["blocks"].items() if size)
        figures = f"{row['useful']:.1%}", f"{row['cycles']:,}", f"{row['copy_cycles']:,}"
        view.add_row(row["chip"], row["kind"], row["shape"], tiles, *figures)
    Console().print(view)
