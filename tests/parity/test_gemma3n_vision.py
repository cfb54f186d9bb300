"""MobileNetV5 beside timm's, stage by stage."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import DATA, assert_close, case
from safetensors.numpy import load_file

from gemma_checkpoints.hf.arch_def import blocks_from_timm
from gemma_checkpoints.hf.mobilenet_names import mobilenet_rows
from gemma_jax.encoder_config import MobileNetConfig
from gemma_jax.runtime import Runtime
from gemma_jax.vision.mobilenet import MobileNetEncoder
from gemma_jax.weights.tree import flat_params

IDS = dict(image_token=98, start_token=97, end_token=99)


def config(folder: str) -> MobileNetConfig:
    described = json.loads((DATA / folder / "config.json").read_text())
    return MobileNetConfig(
        d_tower=described["num_features"],
        d_stem=described["stem_size"],
        stages=blocks_from_timm(described["arch_def"]),
        image_size=described["image_size"],
        num_soft_tokens=described["msfa_output_resolution"] ** 2,
        **IDS,
    )


def loaded(folder: str) -> MobileNetEncoder:
    cfg = config(folder)
    encoder = jax.eval_shape(lambda: MobileNetEncoder(cfg, rngs=nnx.Rngs(0)))
    tensors = load_file(DATA / folder / "model.safetensors")
    params = {".".join(map(str, path)): param for path, param in flat_params(encoder).items()}
    rows = {row.ours: row for row in mobilenet_rows(cfg, ours="")}
    assert rows.keys() == params.keys()
    assert {row.theirs for row in rows.values()} == tensors.keys()
    for name, param in params.items():
        row, sizes = rows[name], dict(zip(param.dims, param.shape, strict=True))
        array = tensors[row.theirs].astype(np.float32)
        param.set_value(jnp.asarray(row.parsed(array, sizes) if row.parsed else array))
    return encoder


@pytest.fixture(scope="module")
def encoder():
    return loaded("g3n_vision")


def encode(encoder, pixels, runtime=Runtime(), capture=()):
    return jax.jit(MobileNetEncoder.__call__, static_argnums=(2, 3))(
        encoder, jnp.asarray(pixels), runtime, frozenset(capture)
    )


def test_stages_and_features(encoder):
    given, expected, tolerance = case("g3n_vision", "forward")
    features_ITC, captured = encode(
        encoder, given["pixel_values"], capture=MobileNetEncoder.captures
    )
    assert_close(captured["vision.stem"][:1, :8], expected["stem"], tolerance["stem"])
    for i, stage in enumerate(captured["vision.stages"]):
        assert_close(stage[:1], expected[f"stage_{i}"], tolerance[f"stage_{i}"])
    assert_close(captured["vision.tower"], expected["features"], tolerance["features"])
    I, C, *_ = expected["features"].shape
    in_text = expected["features"].reshape(I, C, -1).transpose(0, 2, 1) * C**0.5
    assert_close(features_ITC, in_text, tolerance["features"] * C**0.5)
