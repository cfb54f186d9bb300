"""MobileNetV5 beside timm's, stage by stage."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from goldens import DATA, assert_close, case
from safetensors.numpy import load_file

from gemma_checkpoints.hf.arch_def import blocks_from_timm, blocks_to_timm
from gemma_checkpoints.hf.mobilenet_names import mobilenet_rows
from gemma_jax.encoder_config import MobileNetConfig
from gemma_jax.mobilenet_presets import MOBILENET_V5_300M
from gemma_jax.runtime import Runtime
from gemma_jax.vision.mobilenet import MobileNetEncoder
from gemma_jax.weights.tree import flat_params

FOLDER = DATA / "g3n_vision"


def config(side: int | None = None) -> MobileNetConfig:
    """Of the stored tower, or of the same with another side of the result."""
    described = json.loads((FOLDER / "config.json").read_text())
    side = side or described["msfa_output_resolution"]
    return MobileNetConfig(
        d_tower=described["num_features"],
        d_stem=described["stem_size"],
        stages=blocks_from_timm(described["arch_def"]),
        image_size=described["image_size"],
        num_soft_tokens=side**2,
        image_token=98,
        start_token=97,
        end_token=99,
    )


def loaded(cfg: MobileNetConfig) -> MobileNetEncoder:
    """The stored weights by their names in timm."""
    encoder = jax.eval_shape(lambda: MobileNetEncoder(cfg, rngs=nnx.Rngs(0)))
    tensors = load_file(FOLDER / "model.safetensors")
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
    return loaded(config())


@pytest.fixture(scope="module")
def pixels():
    return case("g3n_vision", "forward")[0]["pixel_values"]


def encode(encoder, pixels, runtime=Runtime(), capture=()):
    run = jax.jit(MobileNetEncoder.__call__, static_argnums=(2, 3))
    return run(encoder, jnp.asarray(pixels), runtime, frozenset(capture))


def in_reading_order(map_ICYX):
    """What the decoder gets of a map."""
    I, C, *_ = map_ICYX.shape
    return map_ICYX.reshape(I, C, -1).transpose(0, 2, 1) * math.sqrt(C)


def test_stages_and_features(encoder):
    given, expected, tolerance = case("g3n_vision", "forward")
    features_ITC, captured = encode(encoder, given["pixel_values"], capture=encoder.captures)
    assert_close(captured["vision.stem"][:1, :8], expected["stem"], tolerance["stem"])
    for i, stage in enumerate(captured["vision.stages"]):
        assert_close(stage[:1], expected[f"stage_{i}"], tolerance[f"stage_{i}"])
    assert len(captured["vision.stages"]) == 4
    assert_close(captured["vision.tower"], expected["features"], tolerance["features"])
    scaled = tolerance["features"] * math.sqrt(features_ITC.shape[-1])
    assert_close(features_ITC, in_reading_order(expected["features"]), scaled)


@pytest.mark.parametrize(
    ("size", "side"),
    [(32, 2), (64, 2), (96, 3), (64, 3), (32, 3)],
    ids=["as it is", "averaged", "averaged from 6", "interpolated to fewer", "to more"],
)
def test_other_sizes_in_and_out(size, side, pixels):
    _, expected, tolerance = case("g3n_vision", "sizes")
    name = f"features_{size}_{side}"
    captured = encode(loaded(config(side)), pixels[..., :size, :size], capture=["vision.tower"])[1]
    assert_close(captured["vision.tower"], expected[name], tolerance[name])


def test_bfloat16_is_as_near_as_that_of_timm(encoder, pixels):
    facts = json.loads((FOLDER / "sizes.json").read_text())["outputs"]["features_64_2"]
    expected = in_reading_order(case("g3n_vision", "sizes")[1]["features_64_2"])
    runtime = Runtime(vision_dtype=jnp.dtype("bfloat16"))
    features_ITC, _ = encode(encoder, pixels[..., :64, :64], runtime)
    assert features_ITC.dtype == jnp.bfloat16
    error = (features_ITC.astype(np.float32) - expected) / math.sqrt(expected.shape[-1])
    assert np.sqrt(np.mean(error**2)) <= 1.25 * facts["rms_error_bf16"]


def test_the_real_tower_has_as_many_parameters_as_that_of_timm():
    """`sum(p.numel() for p in timm.create_model("mobilenetv5_300m_enc").parameters())`"""
    tower = jax.eval_shape(lambda: MobileNetEncoder(MOBILENET_V5_300M, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tower)) == 294_126_912


def test_the_real_blocks_as_timm_writes_them():
    written = blocks_to_timm(MOBILENET_V5_300M.stages)
    assert [len(stage) for stage in written] == [3, 5, 37, 39]
    assert written[1] == [
        "uir_r1_a3_k5_s2_e6_c256",
        *["uir_r1_a5_k0_s1_e4_c256", "uir_r1_a3_k0_s1_e4_c256"] * 2,
    ]
    assert written[2][9:11] == ["mqa_r1_k3_h12_v2_s1_d64_c640", "uir_r1_a0_k0_s1_e2_c640"]
    assert replace(MOBILENET_V5_300M, stages=blocks_from_timm(written)) == MOBILENET_V5_300M
