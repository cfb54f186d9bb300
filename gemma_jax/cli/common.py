"""What several commands share: options, loading with progress, JSON."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn

stderr = Console(stderr=True)


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class NumericsName(StrEnum):
    hf = "hf"
    gdm = "gdm"


class Weights(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"


Model = Annotated[
    str, typer.Option("--model", "-m", metavar="SRC", help="Catalog name, folder or file.")
]
DTypeOption = Annotated[
    DType | None,
    typer.Option(help="Dtype of the arithmetic. Default: float32 on CPU, else bfloat16."),
]
WeightsOption = Annotated[
    Weights | None,
    typer.Option(help="Dtype the weights are stored in. Default: that of the arithmetic."),
]
NumericsOption = Annotated[
    NumericsName, typer.Option(help="Whose roundings to follow: transformers' or DeepMind's.")
]
AttentionOption = Annotated[
    str | None, typer.Option("--attention-impl", help="Attention implementation; default: auto.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def set_up_jax() -> None:
    """Imports JAX with the persistent compilation cache, in the user's cache folder.

    `JAX_COMPILATION_CACHE_DIR` names another folder; set to nothing, it turns the cache off.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(home / "gemma-jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def load_model(
    source: str,
    *,
    dtype: DType | None,
    weights: Weights | None = None,
    numerics: NumericsName = NumericsName.hf,
    attention_impl: str | None = None,
):
    """`gemma_jax.load` without the tokenizer, under a progress bar on stderr."""
    set_up_jax()
    from gemma_jax.loading import load_model as load

    with byte_progress("loading weights") as update:
        return load(
            source,
            dtype=dtype and dtype.value,
            weights=weights and weights.value,
            numerics=numerics.value,
            attention_impl=attention_impl,
            progress=update,
        )


@contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over bytes; nothing where stderr is no terminal."""
    with _progress(title, DownloadColumn()) as update:
        yield update


@contextmanager
def token_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar over tokens; nothing where stderr is no terminal."""
    count = TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens")
    with _progress(title, count) as update:
        yield update


@contextmanager
def _progress(title: str, count) -> Iterator[Callable[[int, int], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), count)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(result: dict[str, Any]) -> None:
    json.dump(result, sys.stdout, ensure_ascii=False)
    sys.stdout.write("\n")


def read_inputs(path: Path) -> dict[str, Any]:
    """Arrays of a safetensors file by name, without a leading `in.`; outputs (`out.`) left out.

    Raises:
      ValueError: Not a safetensors file, or without `input_ids [B, T]`.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}") from None
    inputs = {name.removeprefix("in."): a for name, a in arrays.items() if name[:4] != "out."}
    if "input_ids" not in inputs or inputs["input_ids"].ndim != 2:
        raise ValueError(f"{path} must hold input_ids [B, T]; it holds {', '.join(inputs)}")
    return inputs


def input_rows(inputs: dict[str, Any], path: Path):
    """`(input_ids, attention mask as bool)`, both `[B, T]`; padding must be at one side of a row.

    Raises:
      ValueError: Shapes differ, a mask has holes, or a row is empty.
    """
    import numpy as np

    ids = inputs["input_ids"]
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids))) != 0
    if mask.shape != ids.shape:
        raise ValueError(f"{path}: attention_mask {mask.shape} must match input_ids {ids.shape}")
    runs = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1) == 1
    if (runs.sum(axis=1) != 1).any():
        row = int(np.argmax(runs.sum(axis=1) != 1))
        raise ValueError(
            f"{path}: attention_mask of row {row} must be one run of ones with padding before or "
            "after it"
        )
    return ids, mask
