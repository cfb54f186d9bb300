"""`gemma-jax list`: the names of models, and which are on this machine."""

from gemma_jax.cli import common


def command(as_json: common.Json = False) -> None:
    """Show the models that have a name: parameters, whether on this machine, origin, terms."""
    from gemma_checkpoints.catalog import CATALOG, stored

    rows = [
        {
            "name": name,
            "parameters": _parameters(name),
            "path": None if (path := stored(name)) is None else str(path),
            "origin": entry.origin,
            "verified": entry.verified or None,
            "terms": entry.terms,
        }
        for name, entry in CATALOG.items()
    ]
    if as_json:
        common.print_json({"models": rows})
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        here = "here" if row["path"] else "-"
        size = "" if row["parameters"] is None else f"{row['parameters'] / 1e9:.2f}B"
        mark = "*" if row["verified"] else " "
        print(f"{row['name']:<{width}}{mark} {size:>7}  {here:<4}  {row['origin']}")
    for said in dict.fromkeys(row["verified"] for row in rows if row["verified"]):
        names = ", ".join(row["name"] for row in rows if row["verified"] == said)
        print(f"* verified is {said}: {names}")
    for terms in dict.fromkeys(row["terms"] for row in rows):
        names = [row["name"] for row in rows if row["terms"] == terms]
        of = "" if len(names) > len(rows) / 2 else f" (of {', '.join(names)})"
        print(f"Terms: {terms}{of}.")
    print("`gemma-jax info NAME` says more.")


def _parameters(name: str) -> int | None:
    """Of the model; `None` where only its files say how large it is."""
    from gemma_checkpoints.params import params_by_part

    cfg = common.known_config(name)
    return None if cfg is None else sum(params_by_part(cfg).values())
