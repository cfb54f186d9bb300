"""A stored audio tower, which is no whole model: read by the rows of the name table alone."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open

from gemma_checkpoints.hf.audio_names import AUDIO, TOWER
from gemma_checkpoints.name_table import expand
from gemma_jax.audio.encoder import AudioEncoder
from gemma_jax.encoder_config import AudioConfig
from gemma_jax.weights.tree import flat_params, with_params

OWNER = "audio."


def config(folder: Path) -> AudioConfig:
    """That of a folder's `config.json`, in transformers' words."""
    theirs = json.loads((folder / "config.json").read_text())
    return AudioConfig(
        d_tower=theirs["hidden_size"],
        num_layers=theirs["conf_num_hidden_layers"],
        num_heads=theirs["conf_num_attention_heads"],
        num_mels=theirs["input_feat_size"],
        conv_channels=tuple(theirs["sscp_conv_channel_size"]),
        conv_norm_eps=theirs["sscp_conv_group_norm_eps"],
        left_context=theirs["conf_attention_context_left"],
        score_cap=theirs["conf_attention_logit_cap"],
        depthwise_kernel=theirs["conf_conv_kernel_size"],
        residual_weight=theirs["conf_residual_weight"],
        clip=theirs["gradient_clipping"],
        reduction=theirs["conf_reduction_factor"],
        norm_eps=theirs["rms_norm_eps"],
        audio_token=theirs["vocab_offset"] + 1,
        start_token=0,
        end_token=theirs["vocab_offset"],
    )


def abstract_encoder(cfg: AudioConfig, layout: str) -> AudioEncoder:
    """With shapes in the place of arrays."""
    return jax.eval_shape(lambda: AudioEncoder(cfg, rngs=nnx.Rngs(0), layout=layout))


def random_encoder(cfg: AudioConfig, layout: str = "scan") -> AudioEncoder:
    """With norms and scales away from their neutral values, so that a mistake shows."""
    encoder, rng = abstract_encoder(cfg, layout), np.random.default_rng(0)

    def value(param: nnx.Param) -> jax.Array:
        shape, facts = param.get_value().shape, param.get_metadata()
        noise = jnp.asarray(rng.standard_normal(shape), jnp.float32)
        inputs = math.prod(shape[len(shape) - len(facts.get("inputs", "")) :])
        return noise * inputs**-0.5 if inputs > 1 else 1 + 0.3 * noise

    return with_params(encoder, {path: value(p) for path, p in flat_params(encoder).items()})


def load(folder: Path, layout: str = "scan") -> AudioEncoder:
    """The encoder in a folder, in float32; every tensor of the file is used."""
    cfg = config(folder)
    encoder = abstract_encoder(cfg, layout)
    rows = expand(AUDIO, {"audio.tower.blocks": cfg.num_layers})
    with safe_open(folder / "model.safetensors", "flax") as file:
        tensors = {TOWER + name: file.get_tensor(name) for name in file.keys()}

    def ours(name: str, dims: str, shape: tuple[int, ...]) -> jax.Array:
        row, sizes = rows[OWNER + name], dict(zip(dims, shape))
        array = np.asarray(tensors.pop(row.theirs).astype(jnp.float32))
        array = array if row.parsed is None else row.parsed(array, sizes)
        assert array.shape == shape, name
        return jnp.asarray(array)

    def value(path: tuple, param: nnx.Param) -> jax.Array:
        shape, dims = param.get_value().shape, param.get_metadata()["dims"]
        if path[:2] != ("tower", "blocks"):
            return ours(".".join(map(str, path)), dims, shape)
        _, _, group, position, *rest = path
        stack = encoder.tower.layer_groups[group]
        layers = [stack.layer_index(position, i) for i in range(stack.repeats)]
        names = [".".join(map(str, ("tower.blocks", layer, *rest))) for layer in layers]
        return jnp.stack([ours(name, dims, shape[1:]) for name in names])

    values = {path: value(path, param) for path, param in flat_params(encoder).items()}
    assert not tensors, "the table knows all of them"
    return with_params(encoder, values)


def changed(encoder: AudioEncoder, **changes) -> AudioEncoder:
    """The same parameters in a tower of another config."""
    other = abstract_encoder(replace(encoder.cfg, **changes), "unrolled")
    return with_params(other, {k: p.get_value() for k, p in flat_params(encoder).items()})
