"""`gemma-jax experiment`: architectures in small, held against each other."""

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common


def command(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Of an ablation; none: list them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for NAME.json and NAME.png.")
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="Three steps with one seed: seconds, and no result.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many; bars span them.")] = 3,
    as_json: common.Json = False,
) -> None:
    """Train variants of a tiny Gemma and compare them; see docs/ablations."""
    common.set_up_jax()
    from gemma_jax.experiments.ablations.names import ABLATIONS

    if name is None:
        _list(ABLATIONS, as_json)
        return
    if name not in ABLATIONS:
        near = get_close_matches(name, ABLATIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(ABLATIONS)}"
        raise ValueError(f"no experiment is named {name!r}; {hint}")
    from gemma_jax.experiments.ablations import results

    found = results.results(
        name, ABLATIONS[name], seeds=seeds, short=short, tell=lambda s: print(s, file=sys.stderr)
    )
    if out is not None:
        for path in results.write(found, out, name):
            print(f"wrote {path}", file=sys.stderr)
    if as_json:
        common.print_json(found)
    else:
        print("\n".join(results.table(found)))


def _list(ablations, as_json: bool) -> None:
    if as_json:
        common.print_json({"experiments": {name: a.about for name, a in ablations.items()}})
        return
    width = max(map(len, ablations))
    for name, ablation in ablations.items():
        print(f"{name:<{width}}  {ablation.about}")
