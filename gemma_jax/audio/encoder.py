"""From log-mel features to the vectors that stand for a sound in a prompt, in the tower's width.

A clip's result never depends on what else is in the batch, nor on what lies behind its end.

Local letters: I clips; M mel bands; C width of the tower.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.audio.conformer import Conformer
from gemma_jax.audio.subsampling import STRIDE
from gemma_jax.config import GemmaConfig
from gemma_jax.encoder_config import AudioConfig
from gemma_jax.nn.encoders import encoder_of
from gemma_jax.nn.layer_groups import Layout
from gemma_jax.runtime import Runtime

_PREFIX = "audio."
Count = TypeVar("Count", int, jax.Array)


def frames_per_token(cfg: AudioConfig) -> int:
    """Mel frames from one soft token to the next: 16, which are 160 milliseconds."""
    return STRIDE ** len(cfg.conv_channels) * cfg.reduction


def num_tokens(frames: Count, cfg: AudioConfig) -> Count:
    """Soft tokens of a clip of so many mel frames.

    Examples:
      >>> from gemma_jax.audio.encoder import num_tokens
      >>> from gemma_jax.presets import USM_CONFORMER
      >>> [num_tokens(n, USM_CONFORMER) for n in (0, 1, 16, 17, 2_997)]
      [0, 1, 1, 2, 188]
    """
    return -(-frames // frames_per_token(cfg))


def longest_clip(cfg: AudioConfig) -> float:
    """Seconds of the longest clip that is heard at once: that its waves may last, and that makes no
    more soft tokens than there are places for."""
    sounds, frames = cfg.sounds, cfg.num_soft_tokens * frames_per_token(cfg)
    samples = (frames - 1) * sounds.hop_length + sounds.frame_length + 1
    samples -= samples % sounds.pad_multiple  # filling up may not add a frame
    return min(sounds.max_samples, samples) / sounds.sampling_rate


class AudioEncoder(nnx.Module):
    """The tower; a `ModalityEmbedder` of the model maps what comes out to the decoder's width.

    Attributes:
      captures: What may be captured: `audio.subsample [I, T, C]`, what enters the blocks,
        `audio.layer_outputs [L, I, T, C]`, and `audio.tower [I, T, C]`, what is returned.
    """

    captures = ("audio.subsample", "audio.layer_outputs", "audio.tower")

    def __init__(self, cfg: AudioConfig, *, rngs: nnx.Rngs, layout: Layout):
        self.cfg = cfg
        self.tower = Conformer(cfg, rngs=rngs, layout=layout)

    def __call__(
        self,
        features_ITM: jax.Array,
        length_I: jax.Array | None,
        runtime: Runtime,
        capture: frozenset[str] = frozenset(),
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Encodes whole clips.

        Args:
          features_ITM: Log-mel features.
          length_I: int32; frames of each clip, what lies behind them does not count. `None`: all.
          runtime: Dtype, mesh, rematerialisation.
          capture: Names out of `captures`.

        Returns:
          Features `[I, num_tokens(T), C]` in the runtime's dtype, zero behind the last of a clip;
          how many each clip has, int32 `[I]`; and what `capture` names.
        """
        I, T, _ = features_ITM.shape
        length_I = jnp.full(I, T) if length_I is None else jnp.asarray(length_I)
        length_I = length_I.astype(jnp.int32)
        inside = frozenset(name.removeprefix(_PREFIX) for name in capture)
        with jax.named_scope("audio"):
            mel_ITM = features_ITM.astype(runtime.dtype)
            x_ITC, _, captured = self.tower(mel_ITM, length_I, runtime, inside)
        captured |= {"tower": x_ITC}
        captured = {name: captured[name.removeprefix(_PREFIX)] for name in capture}
        return x_ITC, num_tokens(length_I, self.cfg), captured


@encoder_of.register
def conformer_encoder(
    audio: AudioConfig, cfg: GemmaConfig, *, rngs: nnx.Rngs, layout: Layout
) -> AudioEncoder:
    """The encoder of `cfg.audio`."""
    return AudioEncoder(audio, rngs=rngs, layout=layout)
