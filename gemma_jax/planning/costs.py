"""Bytes and operations of a step, from the architecture alone: what no program can do without."""

import math
from collections.abc import Iterable
from typing import Any

import jax

from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.decoder.cache import layer_capacity
from gemma_jax.decoder.model import Gemma
from gemma_jax.decoder.skipping import last_with_keys
from gemma_jax.planning.lowering import Work
from gemma_jax.weights.protocol import array_bytes
from gemma_jax.weights.tree import flat_params


def local_bytes(tree: Any) -> int:
    """Of the arrays' parts on one device; arrays may be shapes with shardings."""
    return sum(array_bytes(a, a.sharding.shard_shape(a.shape)) for a in jax.tree.leaves(tree))


def weight_bytes(model: Gemma) -> dict[str, int]:
    """Bytes on one device: of all weights, of the towers that see and hear, and of those that a
    step of text reads (tables of which it reads rows are left out; the head is read)."""
    towers = local_bytes([tower for tower in (model.vision, model.audio) if tower is not None])
    tables = [] if model.per_layer is None else [model.per_layer.table]
    tables += [embedder.table for embedder in model.modality_embedders]
    tables += [] if model.embed.head is None else [model.embed.table]
    total = local_bytes(model)
    return {"all": total, "towers": towers, "read": total - towers - local_bytes(tables)}


def operations(cfg: GemmaConfig, model: Gemma, work: Work) -> float:
    """Multiplications and additions of one step on all devices together, text alone.

    Training: three times those of the forward pass, without what is computed again. Prefill: of the
    chunk that rows end in, whose last tokens alone are read (`gemma_jax.decoder.skipping`).
    """
    all_tokens = work.batch * work.chunk
    read = all_tokens if work.mode == "train" else work.batch  # logits for all, or for the last
    first = _first_read(cfg, work)
    of_all, of_read = _matrix_parameters(model, first)
    linear = 2 * (all_tokens * of_all + read * (of_read + cfg.vocab_size * cfg.d_model))
    return (3 if work.mode == "train" else 1) * linear + score_operations(cfg, work)


def score_operations(cfg: GemmaConfig, work: Work) -> float:
    """Of these, those of attention: scores, and sums over what is seen."""
    first = _first_read(cfg, work)
    length = work.context if work.mode != "train" else work.chunk
    pairs = sum(
        pairs_seen(spec.window, work.chunk if layer < first else 1, length) * cfg.heads_of(spec)[0]
        for layer, spec in enumerate(cfg.layers)
    )
    scores = 4 * work.batch * pairs * cfg.num_heads
    return (3 if work.mode == "train" else 1) * scores


def _first_read(cfg: GemmaConfig, work: Work) -> int:
    """The layer from which on only tokens that are read are computed."""
    return len(cfg.layers) if work.mode == "train" else last_with_keys(cfg.layers)


def cache_bytes_read(cfg: GemmaConfig, work: Work, cache_bytes: int) -> int:
    """Of one device's caches, when they are full; layers that share those of others read too."""
    if work.mode == "train":
        return 0

    def size(specs: Iterable[LayerSpec]) -> int:
        return sum(
            layer_capacity(spec, work.context) * math.prod(cfg.heads_of(spec)) for spec in specs
        )

    return cache_bytes * size(cfg.layers) // size(spec for spec in cfg.layers if spec.makes_keys)


def _matrix_parameters(model: Gemma, first: int) -> tuple[int, int]:
    """Entries of the decoder's matrices, without tables: that all tokens meet, and the read ones.

    Args:
      first: The layer from which on only some tokens are read; of its own, keys and values are made
        of all.
    """
    counts = {True: 0, False: 0}
    for path, param in flat_params(model).items():
        size = math.prod(param.get_value().shape)
        if not param.get_metadata().get("inputs"):
            continue
        if path[0] == "blocks":
            group, place = model.layer_groups[path[1]], path[2]
            for repeat in range(group.repeats):
                layer = group.layer_index(place, repeat)
                keys = path[3:5] in (("attn", "k"), ("attn", "v"))
                counts[layer < first or (layer == first and keys)] += size // group.repeats
        elif path[0] == "streams" or path[:2] == ("per_layer", "proj"):
            counts["merge_maps" not in path] += size
    return counts[True], counts[False]


def pairs_seen(window: int | None, new: int, length: int) -> float:
    """Pairs of a query and a key that it sees, for the last `new` tokens of `length`."""

    def below(n: int) -> float:  # all pairs of a text of n tokens
        if window is None or n <= window:
            return n * (n + 1) / 2
        return window * (window + 1) / 2 + (n - window) * window

    return below(length) - below(length - new)
