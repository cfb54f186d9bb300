"""What an ablation comes to, as JSON and as a picture."""

import json
import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.atomic_files import replacing
from gemma_jax.experiments.ablations.ablation import Ablation
from gemma_jax.experiments.ablations.run import Row, Tell, run_ablation

STORED = Path(__file__).parent / "stored"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def results(
    name: str,
    ablation: Ablation,
    *,
    seeds: int = 3,
    short: bool = False,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Runs an ablation: the short form, three steps with one seed, and unless that alone is wanted
    the whole. `rows` and `short` have the numbers of every seed; bars are least and most of them.
    """
    began = time.perf_counter()
    options = (" --short" if short else "") + (f" --seeds {seeds}" if seeds != 3 else "")
    found: dict[str, Any] = {
        "command": f"gemma-jax experiment {name} --out OUT{options}",
        "about": ablation.about,
        "digest": ablation.digest(),
        "short": run_ablation(ablation.short(), (0,)),
    }
    if not short:
        found |= {
            "seeds": list(range(seeds)),
            "bars": "least and most over seeds",
            "rows": run_ablation(ablation, tuple(range(seeds)), tell=tell),
        }
    return found | {
        "seconds": round(time.perf_counter() - began),
        "packages": {package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def stored(name: str) -> dict[str, Any]:
    """The results in the repository.

    Raises:
      FileNotFoundError: There are none.
    """
    return json.loads((STORED / f"{name}.json").read_text("utf-8"))


def rows_of(found: Mapping[str, Any]) -> dict[str, Row]:
    return found.get("rows") or found["short"]


def write(found: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Writes `NAME.json` and, where matplotlib is there, `NAME.png`; returns what it wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{name}.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    written = [folder / f"{name}.json"]
    if plot(found, folder / f"{name}.png"):
        written.append(folder / f"{name}.png")
    return written


def table(found: Mapping[str, Any]) -> list[str]:
    """Lines for people: the mean over seeds, and least to most."""
    rows = rows_of(found)
    width = max(map(len, rows))
    lines = []
    for name, row in rows.items():
        said = "  ".join(f"{metric} {_said(values)}" for metric, values in row["metrics"].items())
        lines.append(f"{name:<{width}}  {row['parameters']:,} parameters  {said}")
    return lines


def _said(values: list[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return f"no number for {len(values) - len(numbers)} of {len(values)} seeds"
    return f"{np.mean(numbers):.3f} [{min(numbers):.3f}, {max(numbers):.3f}]"


def plot(found: Mapping[str, Any], path: Path) -> bool:
    """Draws a bar for every variant and kind of token; returns whether matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows = rows_of(found)
    metrics = list(next(iter(rows.values()))["metrics"])
    figure = Figure(figsize=(2.6 * len(metrics) + 1, 3), layout="constrained")
    for axes, metric in zip(np.atleast_1d(figure.subplots(1, len(metrics))), metrics):
        for at, row in enumerate(rows.values()):
            values = [v for v in row["metrics"][metric] if v is not None]
            if values:
                mean = float(np.mean(values))
                reach = [[mean - min(values)], [max(values) - mean]]
                axes.bar(at, mean, yerr=reach, color="tab:blue", alpha=0.7, capsize=3)
        axes.set_xticks(range(len(rows)), list(rows), rotation=60, ha="right", fontsize=8)
        axes.set_title(metric)
    figure.supylabel("nats per token, held out", fontsize=9)
    figure.savefig(path, dpi=90)
    return True
