"""`gemma-jax info`: what a model is and what it needs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemma_jax.cli import common

if TYPE_CHECKING:
    from gemma_jax.config import VisionConfig

CONTEXTS = (1_024, 8_192, 32_768, 131_072)


def command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Preset, catalog name or path.")],
    as_json: common.Json = False,
) -> None:
    """Show what a model is and what it needs.

    Parameters, bytes, layers by kind, the vision tower, and cache bytes per context length. Reads
    no weights.
    """
    facts = _facts(source)
    if as_json:
        common.print_json(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=source, show_header=False)
    for name, value in facts.items():
        if not isinstance(value, dict):
            table.add_row(
                name.replace("_", " "), f"{value:,}" if type(value) is int else str(value)
            )
    for encoding, size in facts.get("file_bytes_by_encoding", {}).items():
        table.add_row(f"in the file as {encoding}", _megabytes(size))
    for length, size in facts["cache_bytes_bfloat16"].items():
        table.add_row(f"cache at {int(length):,} tokens (bfloat16)", _megabytes(size))
    for dtype, size in facts["weight_bytes"].items():
        table.add_row(f"weights ({dtype})", _megabytes(size))
    Console().print(table)


def _facts(source: str) -> dict:
    from gemma_checkpoints.params import params_by_part
    from gemma_jax.cache import cache_bytes
    from gemma_jax.presets import PRESETS

    stored = {}
    # Pretrained and instruction-tuned weights are the same model, which a preset describes.
    size = source.removesuffix("-pt").removesuffix("-it")
    if size in PRESETS and not Path(source).exists():
        cfg = PRESETS[size]
    else:
        from gemma_checkpoints import describe, resolve

        summary = describe(resolve(source))
        cfg = summary.config
        stored = {
            "format": summary.format,
            "file_bytes": sum(summary.tensor_bytes.values()),
            "file_bytes_by_encoding": dict(summary.tensor_bytes),
        }
    parts = params_by_part(cfg)
    parameters = sum(parts.values())
    local = [spec for spec in cfg.layers if spec.kind == "local"]
    contexts = [*(n for n in CONTEXTS if n < cfg.max_positions), cfg.max_positions]
    return {
        "parameters": parameters,
        **({} if cfg.vision is None else _by_part(parts)),
        "embedding_parameters": cfg.vocab_size * cfg.d_model,
        **stored,
        "layers": len(cfg.layers),
        "local_layers": len(local),
        "global_layers": len(cfg.layers) - len(local),
        "window": local[0].window if local else 0,
        "d_model": cfg.d_model,
        "d_ff": cfg.layers[0].d_ff,
        "query_heads": cfg.num_heads,
        "kv_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "vocabulary": cfg.vocab_size,
        "context": cfg.max_positions,
        **({} if cfg.vision is None else _vision(cfg.vision)),
        "weight_bytes": {"float32": 4 * parameters, "bfloat16": 2 * parameters},
        "cache_bytes_bfloat16": {str(n): cache_bytes(cfg, 1, n, "bfloat16") for n in contexts},
    }


def _by_part(parts: dict[str, int]) -> dict[str, int]:
    return {f"{part.replace('.', '_')}_parameters": count for part, count in parts.items()}


def _vision(vision: "VisionConfig") -> dict:
    return {
        "image_size": vision.image_size,
        "image_patches": vision.grid**2,
        "soft_tokens_per_image": vision.num_soft_tokens,
        "vision_tower_layers": vision.num_layers,
        "vision_tower_width": vision.d_tower,
    }


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
