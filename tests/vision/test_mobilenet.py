"""MobileNetV5 apart from its numbers: gradients, sizes, captures, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemma_jax.encoder_config import (
    AttentionBlock,
    FusedBlock,
    InvertedBlock,
    MobileNetConfig,
    divisible_channels,
)
from gemma_jax.mobilenet_presets import MOBILENET_V5_300M
from gemma_jax.runtime import Runtime
from gemma_jax.vision.mobilenet import MobileNetEncoder
from gemma_jax.vision.mobilenet_blocks import Depthwise

TOWER = dict(
    d_tower=24,
    d_stem=8,
    stages=(
        (FusedBlock(channels=8, stride=2), FusedBlock(channels=8)),
        (
            InvertedBlock(channels=16, start_kernel=3, middle_kernel=5, stride=2),
            AttentionBlock(channels=16, num_heads=2, head_dim=8, kv_stride=2),
            InvertedBlock(channels=16, start_kernel=5),
        ),
    ),
    image_size=32,
    num_soft_tokens=4,
    image_token=9,
    start_token=7,
    end_token=8,
)


def config(**changes) -> MobileNetConfig:
    return MobileNetConfig(**TOWER | changes)


@pytest.fixture(scope="module")
def encoder():
    return jax.jit(lambda: MobileNetEncoder(config(), rngs=nnx.Rngs(0)))()


@pytest.fixture(scope="module")
def pixels():
    return jnp.asarray(np.random.default_rng(0).uniform(size=(2, 3, 32, 32)), jnp.float32)


def shapes(tower, pixels, capture=()):
    """Of the features and of what is captured; nothing is computed."""
    run = lambda tower, pixels: tower(pixels, Runtime(), frozenset(capture))  # noqa: E731
    return jax.tree.map(lambda a: a.shape, jax.eval_shape(run, tower, pixels))


def test_captured_maps_are_as_pixels_are(encoder, pixels):
    features, captured = shapes(encoder, pixels, encoder.captures)
    assert features == (2, 4, 24)
    assert captured == {
        "vision.stem": (2, 8, 16, 16),
        "vision.stages": ((2, 8, 8, 8), (2, 16, 4, 4)),
        "vision.tower": (2, 24, 2, 2),
    }
    assert shapes(encoder, pixels, ["vision.tower"])[1].keys() == {"vision.tower"}
    assert shapes(encoder, pixels)[1] == {}


def test_an_image_does_not_depend_on_the_others(encoder, pixels):
    encode = jax.jit(lambda encoder, pixels: encoder(pixels, Runtime())[0])
    together = encode(encoder, pixels)
    np.testing.assert_allclose(encode(encoder, pixels[1:]), together[1:], atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_gradients_reach_every_parameter_and_the_pixels(encoder, pixels):
    def loss(encoder, pixels, runtime):
        return jnp.mean(encoder(pixels, runtime)[0] ** 2 * weights)

    weights = np.random.default_rng(1).uniform(size=(2, 4, 24)).astype(np.float32)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    kept, again = (gradient(encoder, pixels, Runtime(remat=remat)) for remat in (False, True))
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        assert np.isfinite(one).all() and np.abs(one).max() > 0
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(one).max(), rtol=1e-4)


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 7), (1, 2)])
def test_a_depthwise_convolution_is_a_convolution_in_groups(kernel, stride, size):
    depthwise = Depthwise("C", 4, kernel, stride, 1e-6, rngs=nnx.Rngs(0))
    x_IYXC = jax.random.normal(jax.random.key(1), (2, *size, 4))
    expected = jax.lax.conv_general_dilated(
        x_IYXC,
        depthwise.w[...][:, None],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        feature_group_count=4,
    )
    np.testing.assert_allclose(depthwise(x_IYXC), depthwise.norm(expected), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 36, 36), (1, 3, 32, 64), (1, 1, 32, 32), (3, 32, 32)])
def test_wrong_pixels_are_refused(encoder, shape):
    with pytest.raises(ValueError, match=r"size, size\] with a multiple of 8 .* got \[.*\d\]$"):
        encoder(jnp.zeros(shape), Runtime())


@pytest.mark.parametrize("size", [256, 512, 768])
def test_the_real_tower_makes_as_many_features_of_every_size(size):
    tower = jax.eval_shape(lambda: MobileNetEncoder(MOBILENET_V5_300M, rngs=nnx.Rngs(0)))
    pixels = jax.ShapeDtypeStruct((2, 3, size, size), jnp.float32)
    features, captured = shapes(tower, pixels, ["vision.stages"])
    assert features == (2, 256, 2_048)
    sides = [size // stride for stride in (4, 8, 16, 32)]
    assert [shape[1:] for shape in captured["vision.stages"]] == [
        (channels, side, side) for channels, side in zip((128, 256, 640, 1_280), sides)
    ]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"image_size": 36}, "image_size=36 must be a multiple of 8"),
        ({"num_soft_tokens": 5}, "num_soft_tokens=5 must be a square"),
        ({"stages": TOWER["stages"][:1]}, "stages must hold at least two"),
        ({"d_stem": 8, "stages": (TOWER["stages"][1][1:2],) * 2}, "the 8 channels that come in"),
    ],
)
def test_towers_that_cannot_be_are_refused(changes, error):
    with pytest.raises(ValueError, match=error):
        config(**changes)


def test_strides_need_a_window():
    with pytest.raises(ValueError, match="stride=2 needs a start_kernel or a middle_kernel"):
        InvertedBlock(channels=8, stride=2)


def test_channels_in_between_are_multiples_of_eight():
    """As `timm.layers.make_divisible` has them."""
    assert [divisible_channels(n) for n in (1, 12, 20, 36, 88, 91.9, 92)] == [
        8, 16, 24, 40, 88, 88, 96,
    ]  # fmt: skip
