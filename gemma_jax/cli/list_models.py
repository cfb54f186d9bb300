"""`gemma-jax list`: the names of models, and which are on this machine."""

from gemma_jax.cli import common


def command(as_json: common.Json = False) -> None:
    """Show the models that have a name: parameters, whether on this machine, origin, terms."""
    from gemma_checkpoints.catalog import CATALOG, TERMS, stored

    rows = [
        {
            "name": name,
            "parameters": _parameters(name),
            "path": None if (path := stored(name)) is None else str(path),
            "origin": entry.origin,
            "terms": TERMS,
        }
        for name, entry in CATALOG.items()
    ]
    if as_json:
        common.print_json({"models": rows})
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        here = "here" if row["path"] else "-"
        print(
            f"{row['name']:<{width}}  {row['parameters'] / 1e9:6.2f}B  {here:<4}  {row['origin']}"
        )
    print(f"Terms: {TERMS}. `gemma-jax info NAME` says more.")


def _parameters(name: str) -> int:
    from gemma_checkpoints.params import params_by_part
    from gemma_jax.presets import preset

    return sum(params_by_part(preset(name.removesuffix("-it").removesuffix("-pt"))).values())
