"""`gemma-jax train`: fine-tune a model, from a config in TOML to a folder."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_jax.cli import common, progress
from gemma_jax.cli.model_options import all_but, refuse_options

if TYPE_CHECKING:
    from gemma_jax.runs.config import RunConfig

CASE = ("model", "inputs", "settings", "output", "adapter", "reference")


@refuse_options(all_but("adapter", because="train is told by its config, in [load]"))
def command(
    config: Annotated[
        Path | None, typer.Argument(metavar="CONFIG.toml", help="What the run is.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the config's folder.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="In the place of what the config says; repeatable."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read the data, say what is in them, and stop.")
    ] = False,
    dry_run_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Take so many steps on stored inputs instead of a run."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="SRC", help="Of a dry run.")
    ] = None,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(exists=True, dir_okay=False, help="Safetensors file of a dry run."),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JSON file: what a dry run computes."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Safetensors file that a dry run writes.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Adapter that a dry run trains, a PEFT folder.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="Reference or teacher of a dry run. Default: as the settings name it, or the "
            "folder `reference` or `teacher` beside them.",
        ),
    ] = None,
) -> None:
    """Fine-tune a model.

    CONFIG.toml says on what, and how; see docs/training.md. With --dry-run-steps, stored inputs
    take its place, to hold losses, gradients and parameters against those of another library.
    """
    given = dict(zip(CASE, (model, inputs, settings, output, adapter, reference)))
    if dry_run_steps is not None:
        _refuse({"CONFIG.toml": config, "--resume": resume, "--set": set_, "--check": check})
        _dry_run(dry_run_steps, **given)
        return
    _refuse({f"--{name}": value for name, value in given.items()}, "is for --dry-run-steps")
    if config is None:
        raise ValueError("name a config: gemma-jax train CONFIG.toml; docs/training.md has one")
    _run(config, resume, set_ or [], check)


def _refuse(given: Mapping[str, Any], why: str = "is not for --dry-run-steps") -> None:
    for name, value in given.items():
        if value:
            raise ValueError(f"{name} {why}; leave it out")


def _run(path: Path, resume: bool, changes: list[str], check: bool) -> None:
    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    common.set_up_jax()
    import jax

    from gemma_jax.runs.config import read_config
    from gemma_jax.runs.folder import RunFolder
    from gemma_jax.runs.prepared import prepare

    config, tables = read_config(path, changes)
    if check:
        _say_data(config)
        return
    RunFolder(config.out, resume=resume).refuse_other(tables)  # before anything is loaded
    with progress.loading() as bar:
        prepared = prepare(config, progress=bar)
    speaks = jax.process_index() == 0
    if speaks:
        print(prepared.summary, file=sys.stderr)
    with progress.steps(prepared.steps) as bar:
        saved = prepared.run(tables, resume=resume, watchers=[bar] if speaks else [])
    print(saved)


def _say_data(config: "RunConfig") -> None:
    from gemma_jax.loading import load_tokenizer
    from gemma_jax.training.data.statistics import describe

    cfg, _ = common.find_config(config.model)
    tokenizer = load_tokenizer(config.model)
    for name, data in (("data", config.data), ("held_out", config.held_out)):
        if data is not None:
            print(f"{name}: {describe(data, tokenizer, cfg)}")


def _dry_run(
    steps: int,
    model: str | None,
    inputs: list[Path] | None,
    settings: Path | None,
    output: Path | None,
    adapter: Path | None,
    reference: str | None,
) -> None:
    if model is None or not inputs or settings is None or output is None:
        missing = {"--model": model, "--inputs": inputs, "--settings": settings, "--output": output}
        absent = ", ".join(name for name, value in missing.items() if not value)
        raise ValueError(f"--dry-run-steps needs {absent} as well")
    common.set_up_jax()
    from gemma_jax.atomic_files import replacing
    from gemma_jax.runs.stored_case import load_case
    from gemma_jax.runs.stored_steps import run_case

    said = _settings(settings)
    with replacing(output) as path:  # entered first: a wrong path should not cost the computation
        with progress.loading() as bar:
            case = load_case(
                model,
                inputs,
                said,
                beside=settings.parent,
                adapter=adapter,
                reference=reference,
                progress=bar,
            )
        with progress.compiling():
            arrays = run_case(case, steps)
        common.save_arrays(arrays, path, output)


def _settings(path: Path) -> dict[str, Any]:
    try:
        said = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path} must hold an object")
    return said
