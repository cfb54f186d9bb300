"""The table of `docs/hardware.md`: which model, stored how, with how much context, in how many GB.

`python -m gemma_jax.planning.memory_table docs/hardware.md` writes it between the two comments that
name this module; without a file it prints it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from gemma_jax.config import GemmaConfig
from gemma_jax.planning.memory import longest_context, text_of, weights_by_storage
from gemma_jax.presets import PRESETS
from gemma_jax.storages import WeightStorage
from gemma_jax.weights.off_device import Place

BEGIN = "<!-- python -m gemma_jax.planning.memory_table docs/hardware.md -->\n"
END = "<!-- end of the table -->\n"
BUDGETS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 54, 64)  # GB
STORAGES: tuple[WeightStorage, ...] = ("bfloat16", "int8", "int4:32", "int4:64")
K = 1_024
# Name for people, preset, whether its towers are loaded, and where its per-layer table lies.
MODELS: tuple[tuple[str, str, bool, Place], ...] = (
    ("270M", "gemma3-270m", False, "device"),
    ("1B", "gemma3-1b", False, "device"),
    ("4B", "gemma3-4b", False, "device"),
    ("4B, sees", "gemma3-4b", True, "device"),
    ("12B", "gemma3-12b", False, "device"),
    ("12B, sees", "gemma3-12b", True, "device"),
    ("27B", "gemma3-27b", False, "device"),
    ("27B, sees", "gemma3-27b", True, "device"),
    ("E2B", "gemma3n-e2b", False, "device"),
    ("E2B, table on disk", "gemma3n-e2b", False, "disk"),
    ("E4B", "gemma3n-e4b", False, "device"),
    ("E4B, table on disk", "gemma3n-e4b", False, "disk"),
)


def memory_table() -> str:
    """The table in Markdown.

    A cell has the longest contexts that fit beside the weights, in units of 1,024 tokens, with
    bfloat16 and with int8 caches; one number if both are the model's whole context.
    """
    heads = ("model", "weights", "GB", *map(str, BUDGETS))
    lines = [_row(heads), _row(["---", "---", *["---:"] * (len(heads) - 2)])]
    for name, preset, sees, place in MODELS:
        cfg = PRESETS[preset] if sees else text_of(PRESETS[preset])
        for storage, weights in weights_by_storage(cfg, STORAGES).items():
            size = weights.by_place(place)["device"]
            cells = [_contexts(cfg, int(budget * 1e9) - size) for budget in BUDGETS]
            lines.append(_row((name, storage, f"{size / 1e9:.2f}", *cells)))
    return "".join(lines)


def _contexts(cfg: GemmaConfig, free: int) -> str:
    """`32K, 64K`; `-` where not even 1,024 tokens fit."""
    tokens = [longest_context(cfg, free, dtype) for dtype in ("bfloat16", "int8")]
    if max(tokens) < K:
        return "-"
    if min(tokens) == cfg.max_positions:
        return f"{cfg.max_positions // K}K"
    return ", ".join(f"{n // K}K" if n >= K else "-" for n in tokens)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def with_table(document: str) -> str:
    """A document with the table between the two comments."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document needs the lines {BEGIN.strip()} and {END.strip()}")
    return f"{before}{BEGIN}\n{memory_table()}\n{END}{after}"


def main() -> None:
    if len(sys.argv) == 1:
        sys.stdout.write(memory_table())
        return
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
