"""Soft tokens of a sound while it is heard, the same as those of the whole clip.

Token `i` is out as soon as mel frame `16 i + 6` is in: the first after 92 milliseconds of sound,
then one every 160. Nothing later counts for it, but for the end of the clip: there the missing
frames are zeros.

A stream takes pieces of 16 mel frames, of whatever lengths the samples come, so that one program
does for all of it. The pieces end where tokens are complete; for that the first begins with nine
frames that lie before the clip.

Local letters: I clips; M mel bands; C width of the tower.
"""

from collections.abc import Callable
from functools import partial
from numbers import Integral

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.audio.conformer import ConformerCache, ConformerState
from gemma_jax.audio.encoder import AudioEncoder, frames_per_token, num_tokens
from gemma_jax.audio.mel import MelStream
from gemma_jax.audio.subsampling import STRIDE, ConvState
from gemma_jax.audio.waves import mono_piece
from gemma_jax.encoder_config import AudioConfig
from gemma_jax.nn.layer_groups import LayerGroup
from gemma_jax.runtime import Runtime

UNKNOWN = np.iinfo(np.int32).max  # length of a clip that goes on


def look_ahead(cfg: AudioConfig) -> int:
    """How many mel frames lie between the first of a token and the last that counts for it: 6."""
    windows = range(len(cfg.conv_channels))
    return (cfg.conv_kernel - 1) * sum(STRIDE**i for i in windows)


def first_frame(cfg: AudioConfig) -> int:
    """Index of the frame that a stream begins with: -9, and the first piece ends with frame 6."""
    return -(-(look_ahead(cfg) + 1) % frames_per_token(cfg))


def begin(
    cfg: AudioConfig, layer_groups: tuple[LayerGroup, ...], dtype: jnp.dtype, clips: int = 1
) -> ConformerState:
    """The state of clips of which nothing has been heard yet.

    Args:
      layer_groups: Of the tower.
      dtype: Of the activations.
      clips: How many are heard side by side.
    """
    layer = ConformerCache.empty(cfg, clips, dtype)
    layers = tuple(
        tuple(
            jax.tree.map(lambda a, n=group.repeats: jnp.zeros((n, *a.shape), a.dtype), layer)
            for _ in group.period
        )
        for group in layer_groups
    )
    channels = (1, *cfg.conv_channels)
    convs = tuple(
        ConvState.empty(clips, cfg.conv_kernel, bands, channels, dtype)
        for bands, channels in zip(cfg.bands[:-1], channels)
    )
    next_I = jnp.full(clips, first_frame(cfg), jnp.int32)
    return ConformerState(next_I=next_I, convs=convs, layers=layers)


@partial(jax.jit, static_argnames="runtime")
def step(
    encoder: AudioEncoder,
    state: ConformerState,
    mel_ITM: jax.Array,
    length_I: jax.Array,
    runtime: Runtime,
) -> tuple[ConformerState, jax.Array]:
    """Takes the next frames of each clip.

    Args:
      encoder: What hears; the same weights and the same code as for whole clips.
      state: Of the frames before.
      mel_ITM: A multiple of `frames_per_token` many.
      length_I: int32; frames of each clip, or `UNKNOWN` for one that goes on.
      runtime: How to compute.

    Returns:
      The state after them, and features `[I, T / 16, C]`; zero behind the last of a clip.
    """
    with jax.named_scope("audio"):
        mel_ITM = mel_ITM.astype(runtime.dtype)
        x_ITC, state, _ = encoder.tower(mel_ITM, length_I, runtime, state=state)
    return state, x_ITC


class AudioStream:
    """Hears one clip piece by piece: `push` samples, as many as there are, and `finish`.

    All that comes out, one after the other, is what the encoder makes of the whole clip, within the
    noise of another order of summation. A clip may be longer than those that models were trained on
    (30 seconds); the state stays as small as it is.

    Args:
      encoder: `model.audio`.
      runtime: `model.runtime`.
      embed: From features `[n, C]` to what the decoder reads, `[n, D]`; by default, they come out
        as they are.
      tokens_per_step: More of them share the reading of the weights, and wait for each other.

    Attributes:
      state: Of the tower; `state.nbytes` says how large.
      num_frames, num_tokens: So many mel frames went in, so many soft tokens came out.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> from flax import nnx
      >>> from gemma_jax.encoder_config import AudioConfig
      >>> cfg = AudioConfig(
      ...     d_tower=16, num_layers=1, num_heads=2, num_mels=8, conv_channels=(4, 4),
      ...     audio_token=0, start_token=1, end_token=2,
      ... )
      >>> encoder = AudioEncoder(cfg, rngs=nnx.Rngs(0), layout="unrolled")
      >>> stream = gj.AudioStream(encoder)  # gj.audio_stream(model) of a whole model
      >>> tenths = np.zeros((10, 1_600), np.float32)
      >>> [len(stream.push(tenth)) for tenth in tenths], len(stream.finish())
      ([1, 0, 1, 0, 1, 1, 0, 1, 1, 0], 1)
    """

    def __init__(
        self,
        encoder: AudioEncoder,
        runtime: Runtime = Runtime(),
        *,
        embed: Callable[[jax.Array], jax.Array] | None = None,
        tokens_per_step: int = 1,
    ) -> None:
        if not isinstance(tokens_per_step, Integral) or tokens_per_step < 1:
            raise ValueError(f"{tokens_per_step=} must be a positive integer")
        cfg = encoder.cfg
        self._encoder, self._runtime, self._embed = encoder, runtime, embed
        self._piece = tokens_per_step * frames_per_token(cfg)
        self._rate = cfg.sounds.sampling_rate
        self._sounds = MelStream(cfg.sounds, cfg.num_mels)
        self._waiting_TM = np.zeros((-first_frame(cfg), cfg.num_mels), np.float32)
        self._next_token = -(look_ahead(cfg) // frames_per_token(cfg))
        self.state = begin(cfg, encoder.tower.layer_groups, runtime.dtype)
        self.num_frames = 0

    @property
    def num_tokens(self) -> int:
        """See the class."""
        return max(0, self._next_token)

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Takes samples at the rate of the encoder's `sounds`.

        Args:
          samples: An array as `Audio` takes it, floats in [-1, 1] or integers; may be empty.

        Returns:
          The soft tokens that are complete now, `[n, C]`, or as `embed` makes them.
        """
        return self.push_mel(self._sounds.push(mono_piece(samples, self._rate)))

    def push_mel(self, mel_TM: np.ndarray) -> np.ndarray:
        """The same for mel frames, `[T, M]`; not to be mixed with samples."""
        mel_TM, bands = np.asarray(mel_TM), self._waiting_TM.shape[1]
        if mel_TM.ndim != 2 or mel_TM.shape[1] != bands or mel_TM.dtype.kind != "f":
            shape = list(mel_TM.shape)
            raise ValueError(f"expected mel frames as floats [T, {bands}], got {shape}")
        if not np.isfinite(mel_TM).all():  # the state would keep what they make for good
            raise ValueError("mel frames hold NaN or infinity")
        self.num_frames += len(mel_TM)
        self._waiting_TM = np.concatenate([self._waiting_TM, mel_TM])
        tokens = []
        while len(self._waiting_TM) >= self._piece:
            tokens.append(self._step(UNKNOWN))
        return self._joined(tokens)

    def finish(self) -> np.ndarray:
        """Ends the clip; returns the soft tokens that are left."""
        tokens = [self.push_mel(self._sounds.finish())]
        total = num_tokens(self.num_frames, self._encoder.cfg)
        while self._next_token < total:
            missing = max(0, self._piece - len(self._waiting_TM))
            self._waiting_TM = np.pad(self._waiting_TM, ((0, missing), (0, 0)))
            left = total - self.num_tokens
            tokens.append(self._step(self.num_frames)[:left])
        return self._joined(tokens)

    def _step(self, length: int) -> np.ndarray:
        """Takes a piece of what waits; the tokens of it that are of the clip."""
        mel_TM, self._waiting_TM = np.split(self._waiting_TM, [self._piece])
        length_I = np.array([length], np.int32)
        self.state, x_ITC = step(self._encoder, self.state, mel_TM[None], length_I, self._runtime)
        tokens = x_ITC[0] if self._embed is None else self._embed(x_ITC[0])
        before_clip = max(0, -self._next_token)
        self._next_token += len(tokens)
        return np.asarray(tokens)[before_clip:]

    def _joined(self, tokens: list[np.ndarray]) -> np.ndarray:
        if tokens:
            return np.concatenate(tokens)
        like = jax.eval_shape(self._embed or (lambda x: x), self._feature_shape())
        return np.zeros((0, *like.shape[1:]), like.dtype)

    def _feature_shape(self) -> jax.ShapeDtypeStruct:
        cfg = self._encoder.cfg
        count = self._piece // frames_per_token(cfg)
        return jax.ShapeDtypeStruct((count, cfg.d_tower), self._runtime.dtype)
