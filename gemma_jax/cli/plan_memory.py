"""`gemma-jax plan --memory`: contexts that so many bytes leave, by storage of weights."""

import re
from typing import Any

import typer

from gemma_jax.cli import common
from gemma_jax.cli.errors import NO_ROOM
from gemma_jax.storages import CACHE_STORAGES

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(text: str) -> int:
    """`8GB` -> 8,000,000,000; GiB are 2^30.

    >>> parse_bytes("500 MB"), parse_bytes("1.5GiB")
    (500000000, 1610612736)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([a-z]*)", text.strip().lower())
    if match is None or match[2] not in UNITS:
        raise ValueError(f"--memory {text!r} must be a number of bytes, as in 8GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def show(source: str, slice_name: str | None, memory: int, as_json: bool) -> None:
    """Prints it; ends with exit code 3 if no storage leaves room for a token."""
    facts = _facts(source, slice_name, memory)
    contexts = [n for row in facts["storages"] for n in row["contexts"].values()]
    common.print_json(facts) if as_json else _print(facts)
    raise typer.Exit(0 if any(contexts) else NO_ROOM)


def _facts(source: str, slice_name: str | None, memory: int) -> dict[str, Any]:
    from gemma_jax.planning.memory import longest_context

    cfg, weights = common.weights_by_storage(source, slice_name)
    has_table = any(sizes.table for sizes in weights.values())
    rows = []
    for place in ("device", "disk") if has_table else ("device",):
        for storage, sizes in weights.items():
            if storage == "int4:32":  # the other name of int4
                continue
            size = sizes.by_place(place)["device"]
            contexts = {d: longest_context(cfg, memory - size, d) for d in CACHE_STORAGES}
            table = {"per_layer_table": place} if has_table else {}
            rows.append({"weights": storage, **table, "bytes": size, "contexts": contexts})
    return {"model": source, "memory_bytes": memory, "storages": rows}


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{facts['model']} in {facts['memory_bytes'] / 1e9:,.2f} GB: tokens by dtype of caches"
    table = Table("weights", "GB", *CACHE_STORAGES, title=title)
    for row in facts["storages"]:
        off = ", table on disk" if row.get("per_layer_table") == "disk" else ""
        tokens = (f"{n:,}" if n else "-" for n in row["contexts"].values())
        table.add_row(row["weights"] + off, f"{row['bytes'] / 1e9:,.2f}", *tokens)
    Console(highlight=False).print(table)
