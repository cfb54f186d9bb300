"""`gemma-jax probe`: what a model finds in long texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.model_options import ModelOptions, model_options

if TYPE_CHECKING:
    from gemma_jax.evaluation.probing import Found


@model_options()
def command(
    model: common.Model = "gemma3-270m",
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="needle, many-keys, many-values, variables, frequent-words. Default: all.",
        ),
    ] = None,
    lengths: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens of the texts.")
    ] = "512,1024,2048",
    depths: Annotated[
        str, typer.Option(metavar="X,...", help="Where needles lie: 0 first, 1 last.")
    ] = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(min=1, help="Texts of each kind.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the first text.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Where to draw a heat map (PNG).")
    ] = None,
    *,
    options: ModelOptions,
    as_json: common.Json = False,
) -> None:
    """Ask for what lies in long texts: needles, variables, frequent words.

    By task and length, and by depth for needles: the share of answers that are found, and how much
    likelier (nats per token) the answer is with what is asked for in the text than without. And how
    far reading through ring caches differs from one pass over the text.
    """
    wanted_lengths = _numbers(lengths, "--lengths", int)
    wanted_depths = _numbers(depths, "--depths", float)
    common.set_up_jax()
    from gemma_jax.evaluation.long_context import TASKS
    from gemma_jax.evaluation.probing import probe, ring_errors
    from gemma_jax.loading import load_tokenizer

    names = tuple(TASKS) if tasks is None else common.names(tasks)
    if unknown := [name for name in names if name not in TASKS]:
        raise ValueError(f"--tasks {unknown[0]}: expected some of {', '.join(TASKS)}")
    tokenizer, gemma = load_tokenizer(model), options.for_writing().load(model)
    with progress.asking() as bar:
        found = probe(
            gemma, tokenizer, tasks=names, lengths=wanted_lengths, depths=wanted_depths,
            samples=samples, seed=seed, progress=bar,
        )  # fmt: skip
    errors = ring_errors(gemma, tokenizer, wanted_lengths, seed=seed)
    if plot is not None:
        _draw(found, plot)
    if as_json:
        rings = [{"length": n, "difference": error} for n, error in errors.items()]
        common.print_json({"questions": [one.row() for one in found], "ring_caches": rings})
        return
    for task in names:
        _print_task(task, [one for one in found if one.task == task])
    for length, error in errors.items():
        print(f"ring caches, {length} tokens: within {error:.1e} nats of one pass")


def _numbers(text: str, option: str, kind) -> list:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text}: expected numbers, with commas between") from None
    low, high = (1, np.inf) if kind is int else (0, 1)
    if bad := [n for n in numbers if not low <= n <= high]:
        raise ValueError(f"{option} {bad[0]}: expected {low} to {high}")
    return numbers


def _print_task(task: str, found: "Sequence[Found]") -> None:
    depths = list(dict.fromkeys(one.depth for one in found))
    shown = ["" if depth is None else f"depth {depth:g}" for depth in depths]
    print(f"{task:<16}" + "".join(f"{name:>18}" for name in shown))
    for length in dict.fromkeys(one.length for one in found):
        cells = []
        for depth in depths:
            some = [one for one in found if (one.length, one.depth) == (length, depth)]
            right = np.mean([one.accuracy for one in some])
            gain = np.mean([one.log_prob - one.log_prob_without for one in some])
            cells.append(f"{100 * right:.0f} % ({gain:+.2f})")
        print(f"{length:>14}  " + "".join(f"{cell:>18}" for cell in cells))


def _draw(found: "Sequence[Found]", path: Path) -> None:
    from gemma_jax import viz

    needles = [one for one in found if one.depth is not None]
    if not needles:
        raise ValueError("--plot: the heat map is of needles; ask for needle or many-keys")
    figure = viz.plot_depths(needles).figure
    figure.savefig(path, dpi=150, bbox_inches="tight")
