"""`gemma-jax info`: what a model is and what it needs."""

from dataclasses import asdict
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_jax.cli import common
from gemma_jax.cli.model_options import SliceOption, all_but, refuse_options
from gemma_jax.storages import CACHE_STORAGES

if TYPE_CHECKING:
    from rich.table import Table

    from gemma_jax.config import GemmaConfig
    from gemma_jax.encoder_config import AudioConfig, MobileNetConfig, VisionConfig
    from gemma_jax.planning.memory import WeightBytes
    from gemma_jax.weights.off_device import Place

CONTEXTS = (1_024, 8_192, 32_768, 131_072)


@refuse_options(all_but("slice", because="info reads no weights"))
def command(
    source: Annotated[str, common.architecture("SRC")],
    placement: Annotated[
        bool,
        typer.Option("--placement", help="Bytes on device, host and disk by place of the table."),
    ] = False,
    slice_name: SliceOption = None,
    as_json: common.Json = False,
) -> None:
    """Show what a model is and what it needs.

    Parameters, layers by kind, the towers, where answers end, bytes of weights as each storage
    has them, of caches by context length, and of both together. Reads no weights. For people in
    round units (1 GB = 10^9 bytes); exact numbers with --json.
    """
    facts, weights = _facts(source, slice_name)
    if placement:
        facts["placement"] = _placement(weights)
    if as_json:
        common.print_json(facts)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=source, title_justify="left", show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in _rows(facts):
        table.add_row(*row)
    Console(highlight=False).print(table, *_sums(facts))


def _facts(source: str, slice_name: str | None) -> "tuple[dict[str, Any], dict[str, WeightBytes]]":
    from gemma_checkpoints.params import params_by_part
    from gemma_jax.decoder.cache import cache_bytes

    stored: dict = {}
    cfg, summary = common.find_config(source)
    if summary is not None:
        stored = {
            "format": summary.format,
            "file_bytes": sum(summary.tensor_bytes.values()),
            "file_bytes_by_encoding": dict(summary.tensor_bytes),
        }
    text = {} if summary is None or summary.tokenizer is None else _text(source)
    if slice_name is not None:
        stored = {}  # the files hold more than the slice
    cfg, weights = common.weights_by_storage(source, slice_name)
    parts = params_by_part(cfg)
    parameters = sum(parts.values())
    local = [spec for spec in cfg.layers if spec.kind == "local"]
    contexts = [*(n for n in CONTEXTS if n < cfg.max_positions), cfg.max_positions]
    facts = {
        "parameters": parameters,
        **({} if len(parts) == 1 else _by_part(parts)),
        "embedding_parameters": cfg.vocab_size * cfg.d_model,
        **({} if cfg.tied_head else {"head_parameters": cfg.vocab_size * cfg.d_model}),
        "layers": len(cfg.layers),
        "local_layers": len(local),
        "global_layers": len(cfg.layers) - len(local),
        "window": local[0].window if local else None,
        "d_model": cfg.d_model,
        "d_ff": _one_or_all([spec.d_ff for spec in cfg.layers]),
        "query_heads": cfg.num_heads,
        "kv_heads": _one_or_all([cfg.heads_of(spec)[1] for spec in cfg.layers]),
        "head_dim": _one_or_all([cfg.heads_of(spec)[0] for spec in cfg.layers]),
        "vocabulary": cfg.vocab_size,
        "context": cfg.max_positions,
        **({} if cfg.per_layer is None else _per_layer(cfg, parameters, parts["text"])),
        **({} if cfg.vision is None else _vision(cfg.vision)),
        **({} if cfg.audio is None else _audio(cfg.audio)),
        **({} if cfg.text_embedding is None else _text_embedding(cfg)),
        **text,
        **stored,
        "weight_bytes": {storage: sizes.total for storage, sizes in weights.items()},
        **{
            f"cache_bytes_{dtype}": {str(n): cache_bytes(cfg, 1, n, dtype) for n in contexts}
            for dtype in CACHE_STORAGES
        },
        "cache_bytes_if_all_layers_were_global_bfloat16": {
            str(n): 4 * n * sum(prod(cfg.heads_of(spec)) for spec in cfg.layers) for n in contexts
        },
    }
    return facts, weights


def _text(source: str) -> dict:
    """Where an answer ends, and in which format a conversation is written."""
    from gemma_jax.loading import load_sampling, load_tokenizer

    tokenizer, sampling = load_tokenizer(source), load_sampling(source)
    template = tokenizer.chat_template
    facts = {
        "stop_ids": list(tokenizer.stop_ids),
        "stop_pieces": tokenizer.pieces(tokenizer.stop_ids),
        "stop_ids_from": tokenizer.stop_ids_from,
        "chat_template": "Gemma 3's, by default" if template is None else template.summary,
    }
    return facts if sampling is None else facts | {"sampling": asdict(sampling)}


def _per_layer(cfg: "GemmaConfig", parameters: int, of_text: int) -> dict:
    """What models with per-layer embeddings have besides. Effective parameters are those of the
    text decoder."""
    per_layer, shared = cfg.per_layer, sum(spec.kv == "shared" for spec in cfg.layers)
    table = per_layer.vocab_size * len(cfg.layers) * per_layer.width
    streams = {} if cfg.altup is None else {"altup_streams": cfg.altup.num_streams}
    effective = of_text - cfg.vocab_size * cfg.d_model - table
    published = {}
    if cfg.altup is not None:
        # Gemma 3n's files, and so published counts, hold keys and values for layers that use none.
        head = cfg.num_kv_heads * cfg.head_dim * cfg.d_model
        unused = shared * (2 * head + (cfg.head_dim if cfg.qk_norm else 0))
        published = {
            "published_parameters": parameters + unused,
            "published_effective_parameters": effective + unused,
        }
    return {
        "per_layer_table_parameters": table,
        "effective_parameters": effective,
        **published,
        "per_layer_width": per_layer.width,
        **streams,
        "layers_with_a_cache": len(cfg.layers) - shared,
        "layers_sharing_keys_and_values": shared,
        "sparse_layers": sum(spec.sparsity > 0 for spec in cfg.layers),
    }


def _placement(weights: "dict[str, WeightBytes]") -> dict:
    """Place of the per-layer table -> storage -> where -> bytes of weights."""
    if not all(sizes.table for sizes in weights.values()):
        raise ValueError("--placement is about per-layer tables, which only Gemma 3n and 4 have")
    places: tuple[Place, ...] = ("device", "host", "disk")
    return {
        place: {storage: sizes.by_place(place) for storage, sizes in weights.items()}
        for place in places
    }


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


def _by_part(parts: dict[str, int]) -> dict[str, int]:
    return {f"{part.replace('.', '_')}_parameters": count for part, count in parts.items()}


def _vision(vision: "VisionConfig | MobileNetConfig") -> dict:
    from gemma_jax.encoder_config import VisionConfig

    siglip = isinstance(vision, VisionConfig)
    return {
        "image_size": vision.image_size,
        **({"image_patches": vision.grid**2} if siglip else {}),
        "soft_tokens_per_image": vision.num_soft_tokens,
        "vision_tower_layers": vision.num_layers if siglip else sum(map(len, vision.stages)),
        "vision_tower_width": vision.d_tower,
    }


def _audio(audio: "AudioConfig") -> dict:
    return {
        "sampling_rate": audio.sounds.sampling_rate,
        "mel_bands": audio.num_mels,
        "soft_tokens_per_clip": audio.num_soft_tokens,
        "audio_tower_layers": audio.num_layers,
        "audio_tower_width": audio.d_tower,
    }


def _text_embedding(cfg: "GemmaConfig") -> dict:
    head = cfg.text_embedding
    return {
        "reads_both_ways": cfg.bidirectional,
        "embedding_width": head.width(cfg.d_model),
        "longest_text": head.longest(cfg.max_positions),
        "tasks": ", ".join(head.by_task) or "none",
    }


NOTES = {  # published files hold keys and values for layers that share those of others
    "effective_parameters": ", of the text, tables left out",
    "published_parameters": ", unused keys and values counted",
    "published_effective_parameters": ", likewise",
}


def _rows(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people: round, and with a word on what a name does not say."""
    rows = []
    for name, value in facts.items():
        if isinstance(value, dict) or name in ("stop_pieces", "stop_ids_from"):
            continue
        rows.append((name.replace("_", " "), _shown(name, value, facts) + NOTES.get(name, "")))
    if "sampling" in facts:
        sampling = ", ".join(f"{name} {value}" for name, value in facts["sampling"].items())
        rows.append(("sampling", sampling))
    for encoding, size in facts.get("file_bytes_by_encoding", {}).items():
        rows.append((f"in the file as {encoding}", _bytes(size)))
    for storage in _storages(facts):
        rows.append((f"weights ({storage})", _bytes(facts["weight_bytes"][storage])))
    for length, size in facts["cache_bytes_bfloat16"].items():
        if not size:  # it reads both ways
            continue
        full = facts["cache_bytes_if_all_layers_were_global_bfloat16"][length]
        share = "" if size == full else f", {size / full:.1%} of one without windows"
        rows.append((f"cache at {int(length):,} tokens (bfloat16)", _bytes(size) + share))
    for place, by_storage in facts.get("placement", {}).items():
        for storage in () if place == "device" else _storages(facts):
            on = by_storage[storage].items()
            where = ", ".join(f"{_bytes(size)} on {name}" for name, size in on)
            rows.append((f"table on {place} ({storage})", where))
    return rows


def _storages(facts: dict[str, Any]) -> list[str]:
    """Those of `weight_bytes`, each by one name."""
    return [name for name in facts["weight_bytes"] if name != "int4:32"]


def _sums(facts: dict[str, Any]) -> "list[Table]":
    """Weights in every storage with caches of every context, in GB; and caches alone."""
    from rich.table import Table

    cache = facts["cache_bytes_bfloat16"]
    if not any(cache.values()):
        return []
    contexts = [f"{int(length):,}" for length in cache]
    sums = Table("weights", "alone", *contexts, title="GB with a cache (bfloat16)", box=None)
    alone = Table("cache", *contexts, title="GB of caches", box=None)
    for storage in _storages(facts):
        size = facts["weight_bytes"][storage]
        with_cache = (size, *(size + of_cache for of_cache in cache.values()))
        sums.add_row(storage, *(f"{n / 1e9:,.2f}" for n in with_cache))
    for dtype in CACHE_STORAGES:
        sizes = facts[f"cache_bytes_{dtype}"].values()
        alone.add_row(dtype, *(f"{size / 1e9:,.2f}" for size in sizes))
    for table in (sums, alone):
        table.title_justify = "left"
        for column in table.columns[1:]:
            column.justify = "right"
    return [sums, alone]


def _shown(name: str, value: Any, facts: dict[str, Any]) -> str:
    if value is None:
        return "none"
    if name == "stop_ids":
        pieces = zip(value, facts["stop_pieces"], strict=True)
        return ", ".join(f"{i} {piece}" for i, piece in pieces) + f" ({facts['stop_ids_from']})"
    if isinstance(value, list):  # layer by layer
        runs = [(width, len(list(run))) for width, run in groupby(value)]
        return ", ".join(f"{width:,} in {n} layer{'s' * (n > 1)}" for width, n in runs)
    if name.endswith("parameters") and value >= 1e6:
        return f"{value / 1e9:,.2f} B" if value >= 1e9 else f"{value / 1e6:,.1f} M"
    if name.endswith("bytes"):
        return _bytes(value)
    return f"{value:,}" if type(value) is int else str(value)


def _bytes(size: int) -> str:
    if size < 1e6:
        return f"{size / 1e3:,.1f} kB"
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
