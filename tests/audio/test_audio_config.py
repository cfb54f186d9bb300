"""What an `AudioConfig` says: all of it counts, and what makes no sense is refused."""

import dataclasses

import jax
import pytest
import tiny
from flax import nnx

from gemma_jax import Runtime
from gemma_jax.audio.encoder import AudioEncoder, num_tokens
from gemma_jax.encoder_config import AudioConfig
from gemma_jax.presets import USM_CONFORMER


def trace(cfg: AudioConfig) -> str:
    def look(features):
        encoder = AudioEncoder(cfg, rngs=nnx.Rngs(0), layout="scan")
        return encoder(features, None, Runtime()), jax.tree.map(lambda a: a.shape, encoder)

    features = jax.ShapeDtypeStruct((1, 40, cfg.num_mels), "float32")
    return str(jax.make_jaxpr(lambda x: look(x)[0])(features))


def test_every_field_matters():
    """Changing a field changes the parameters or the traced program: none is dead."""
    changes = dict(
        d_tower=28, num_layers=3, num_heads=4, num_mels=12, conv_channels=(6, 5), conv_kernel=5,
        conv_norm_eps=1e-2, left_context=5, score_cap=4.0, depthwise_kernel=3, residual_weight=0.6,
        clip=2.0, reduction=2, norm_eps=1e-5,
    )  # fmt: skip
    # For prompts, and for the features that the tower is given.
    others = {"num_soft_tokens", "audio_token", "start_token", "end_token", "sounds"}
    assert {f.name for f in dataclasses.fields(AudioConfig)} == changes.keys() | others
    before = trace(tiny.audio())
    for name, value in changes.items():
        assert trace(tiny.audio(**{name: value})) != before, name


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=5), "d_tower=24 must be even and a multiple of num_heads=5"),
        (dict(d_tower=21, num_heads=3), "d_tower=21 must be even"),
        (dict(conv_channels=(6,)), r"conv_channels=\(6,\) must be two positive numbers"),
        (dict(conv_kernel=1), "conv_kernel=1 must be at least the stride, 2"),
        (dict(conv_kernel=9), "num_mels=10 are too few for conv_kernel=9"),
        (dict(num_layers=0), "num_layers=0 must be positive"),
        (dict(clip=-1.0), "clip=-1.0 must be positive"),
    ],
)
def test_impossible_towers_are_refused(change, message):
    with pytest.raises(ValueError, match="^" + message):
        tiny.audio(**change)


def test_thirty_seconds_are_as_many_tokens_as_gemma_3n_gives_a_clip():
    sounds = USM_CONFORMER.sounds
    frames = (sounds.max_samples - sounds.frame_length - 1) // sounds.hop_length + 1
    assert num_tokens(frames, USM_CONFORMER) == USM_CONFORMER.num_soft_tokens == 188
