"""`gemma-jax shield`: does an image violate a policy?"""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.model_options import ModelOptions, model_options


@model_options()
def command(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="Image file to judge.")],
    model: common.Model,
    policy: Annotated[
        list[str] | None,
        typer.Option(help="dangerous, sexual or violence; may be repeated. Default: all."),
    ] = None,
    *,
    options: ModelOptions,
    as_json: common.Json = False,
) -> None:
    """Judge an image by safety policies, with ShieldGemma 2.

    Shows the probabilities that IMAGE violates each policy ("Yes") and that it does not ("No").
    """
    common.set_up_jax()
    from gemma_jax.evaluation.shieldgemma import POLICIES, answer_ids, definitions_of, shield
    from gemma_jax.loading import load_tokenizer

    definitions = definitions_of(policy or POLICIES)
    (picture,) = common.open_images([image], model, options.mmproj)
    tokenizer = load_tokenizer(model)
    answer_ids(tokenizer)  # a model that cannot answer need not be loaded
    gemma = options.load(model)
    with progress.compiling():
        verdicts = shield(gemma, tokenizer, picture, definitions)
    if as_json:
        common.print_json({name: asdict(verdict) for name, verdict in verdicts.items()})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("policy", "Yes, it violates it", "No", title=str(image))
    for name, verdict in verdicts.items():
        table.add_row(name, f"{verdict.yes:.4f}", f"{verdict.no:.4f}")
    Console().print(table)
