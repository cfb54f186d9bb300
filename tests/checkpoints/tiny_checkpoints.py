"""Tiny checkpoints, made on the spot."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma_checkpoints.export import host_array
from gemma_checkpoints.gguf.names import gguf_table
from gemma_checkpoints.name_table import expand
from gemma_checkpoints.params import depths, named_slots
from gemma_jax.decoder.model import Gemma, abstract_model
from gemma_jax.presets import preset
from gemma_jax.weights.tree import flat_params

DATA = Path(__file__).parent.parent / "parity" / "data"


def tiny(name: str, num_layers: int = 7, **changes):
    """The preset `name`, with its pattern and switches, at toy sizes that K-quants can store.

    Without towers, unless they are given.
    """
    sizes = dict(vocab_size=96, d_model=256, num_heads=4, num_kv_heads=2, head_dim=64)
    cfg = preset(name)
    layers = tuple(
        replace(spec, d_ff=256, window=spec.window and 6) for spec in cfg.layers[:num_layers]
    )
    others = {"query_pre_attn_scalar": 64, "max_positions": 128}
    others |= {"vision": None, "audio": None, "modality_vocabularies": ()}
    return replace(cfg, layers=layers, **(sizes | others | changes))


@lru_cache(maxsize=16)
def random_model(cfg, layout="scan") -> Gemma:
    """Every parameter random, norms included."""
    leaves, treedef = jax.tree.flatten(abstract_model(cfg, layout=layout))
    rng = np.random.default_rng(0)
    leaves = [jax.numpy.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(treedef, leaves)


def by_name(model: Gemma) -> dict[str, np.ndarray]:
    """Our layer-independent names -> arrays."""
    params = flat_params(model)
    return {name: host_array(params[s.path], s.row) for name, s in named_slots(model).items()}


def write_gguf(
    path: Path, model: Gemma, arch: str, encode, *, split: int = 0, pieces=None, **extra
) -> Path:
    """The decoder of `model` as llama.cpp would write it.

    Args:
      encode: `(name, array) -> (bytes or array, type)`.
      split: If given, in parts of as many tensors.
      pieces: The vocabulary.
      **extra: More tensors.
    """
    gguf = pytest.importorskip("gguf")
    cfg, writer = model.cfg, gguf.GGUFWriter(path, arch, split_max_tensors=split)
    spec, wide = cfg.layers[0], next(s for s in cfg.layers if s.kind == "global")
    writer.add_block_count(len(cfg.layers))
    writer.add_context_length(cfg.max_positions)
    writer.add_embedding_length(cfg.d_model)
    writer.add_feed_forward_length(spec.d_ff)
    writer.add_head_count(cfg.num_heads)
    writer.add_head_count_kv(cfg.num_kv_heads)
    writer.add_key_length(cfg.head_dim)
    writer.add_value_length(cfg.head_dim)
    writer.add_layer_norm_rms_eps(cfg.norm_eps)
    writer.add_rope_freq_base(wide.rope_theta)
    writer.add_token_list(pieces or [b"<pad>", b"a"] * (cfg.vocab_size // 2))
    if spec.window:
        writer.add_sliding_window(spec.window)
        writer.add_sliding_window_pattern([layer.kind == "local" for layer in cfg.layers])
    if wide.rope_scale != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(wide.rope_scale)
    if cfg.attn_soft_cap:
        writer.add_attn_logit_softcapping(cfg.attn_soft_cap)
        writer.add_final_logit_softcapping(cfg.final_soft_cap)
    arrays = by_name(model)
    for ours, row in expand(gguf_table(cfg), depths(cfg)).items():
        array = arrays[ours].astype(np.float32)
        if row.parsed is not None:
            sizes = dict(zip(named_slots(model)[ours].dims, array.shape))
            array = row.parsed.inverse(array, sizes)
        data, kind = (array + 1, None) if row.plus_one else encode(row.theirs, array)
        writer.add_tensor(row.theirs, np.ascontiguousarray(data), raw_dtype=kind)
    for name, array in extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def plain(name, array):
    return array, None
