"""What encoders read becomes soft tokens in the decoder's width.

A tower either ends in a projection of its own (SigLIP), or gives vectors in its width, which the
embedder of its placeholder's vocabulary takes to the decoder's (Gemma 3n's towers).

Local letters: I items that soft tokens come in; M mel bands; C width of a tower.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.decoder.model import Gemma
from gemma_jax.encoder_config import AudioConfig
from gemma_jax.nn.embed import ModalityEmbedder

Captured = dict[str, jax.Array | tuple[jax.Array, ...]]
IMAGE_TOKENS, AUDIO_TOKENS = "vision.soft_tokens", "audio.soft_tokens"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Clips:
    """Holds the sound of several clips, as an audio tower reads it.

    Attributes:
      mel_ITM: float; log-mel frames, see `gemma_jax.audio.mel`.
      lengths_I: int32; so many frames of each clip are real, and what comes after them changes
        nothing. `None`: all.
    """

    mel_ITM: jax.Array
    lengths_I: jax.Array | None = None

    def __len__(self) -> int:
        return len(self.mel_ITM)


@partial(jax.jit, static_argnames=("capture",))
def encode_images(
    model: Gemma, pixels: jax.Array, *, capture: tuple[str, ...] = ()
) -> tuple[jax.Array, Captured]:
    """Soft tokens `[I, T, D]` of images, and intermediate results.

    Args:
      model: With a vision tower.
      pixels: float `[I, 3, size, size]`, as `preprocess` makes them.
      capture: Names out of `model.vision.captures`, or `vision.soft_tokens`.

    Raises:
      ValueError: The model has no tower, it does not take images of this size, or it has nothing of
        such a name to capture.
    """
    if model.cfg.vision is None:
        raise ValueError("this model has no vision tower; images need one that has")
    inside = _names(capture, model.vision.captures, IMAGE_TOKENS)
    x_ITC, captured = model.vision(jnp.asarray(pixels), model.runtime, inside)
    embedder = embedder_of(model, model.cfg.vision.image_token)
    soft_ITD = x_ITC if embedder is None else embedder.soft(x_ITC, model.runtime.numerics)
    captured[IMAGE_TOKENS] = soft_ITD
    return soft_ITD, {name: captured[name] for name in capture}


@partial(jax.jit, static_argnames=("pad", "capture"))
def encode_audio(
    model: Gemma, clips: Clips | jax.Array, *, pad: bool = True, capture: tuple[str, ...] = ()
) -> tuple[jax.Array, Captured]:
    """Soft tokens `[I, T, D]` of clips, and intermediate results.

    Args:
      model: With an audio tower.
      clips: Or mel frames `[I, T, M]` alone, all real.
      pad: Fill every clip up to `num_soft_tokens` of the config with the embedding of the last id
        for sounds, as the model was trained (hf `Gemma3nModel.forward`). Without, T is what the
        longest clip has, and the places behind shorter ones are zero.
      capture: Names out of `model.audio.captures`, or `audio.soft_tokens`, which are without
        padding.

    Raises:
      ValueError: The model has no tower, frames of another shape than it reads, a clip has more
        soft tokens than a run of placeholders, or the tower has nothing of such a name to capture.
    """
    if (cfg := model.cfg.audio) is None:
        raise ValueError("this model has no audio tower; sounds need one that has")
    clips = clips if isinstance(clips, Clips) else Clips(clips)
    check_frames(clips.mel_ITM, cfg)
    inside = _names(capture, model.audio.captures, AUDIO_TOKENS)
    x_ITC, counts_I, captured = model.audio(
        jnp.asarray(clips.mel_ITM), clips.lengths_I, model.runtime, inside
    )
    embedder = embedder_of(model, cfg.audio_token)
    soft_ITD = embedder.soft(x_ITC, model.runtime.numerics)
    captured[AUDIO_TOKENS] = soft_ITD
    if pad:
        if (missing := cfg.num_soft_tokens - soft_ITD.shape[1]) < 0:
            raise ValueError(
                f"a clip of {clips.mel_ITM.shape[1]} frames makes {soft_ITD.shape[1]} soft tokens; "
                f"there is room for {cfg.num_soft_tokens}: split it"
            )
        soft_ITD = jnp.pad(soft_ITD, ((0, 0), (0, missing), (0, 0)))
        real_IT = jnp.arange(cfg.num_soft_tokens) < counts_I[:, None]
        soft_ITD = jnp.where(real_IT[:, :, None], soft_ITD, audio_filling(model))
    return soft_ITD, {name: captured[name] for name in capture}


def check_frames(mel_ITM: jax.Array, cfg: AudioConfig) -> None:
    """Raises `ValueError` if these are no mel frames that the tower of `cfg` reads."""
    shape = list(np.shape(mel_ITM))
    if len(shape) != 3 or shape[1] < 1 or shape[2] != cfg.num_mels:
        raise ValueError(f"expected mel frames [clips, frames, {cfg.num_mels}], got {shape}")


@jax.jit
def audio_filling(model: Gemma) -> jax.Array:
    """What stands behind the last soft token of a clip, as far as placeholders go; `[D]`."""
    embedder, runtime = embedder_of(model, model.cfg.audio.audio_token), model.runtime
    last = jnp.full((1, 1), embedder.vocabulary.vocab_size - 1)
    return embedder.hard(last, runtime.dtype, runtime.numerics)[0, 0]


def embedder_of(model: Gemma, placeholder: int) -> ModalityEmbedder | None:
    """What takes vectors of the tower with this placeholder to the decoder's width."""
    vocabulary = model.cfg.vocabulary_of(placeholder)
    return None if vocabulary is None else model.modality_embedders[vocabulary]


def _names(capture: tuple[str, ...], known: tuple[str, ...], soft: str) -> frozenset[str]:
    """What of `capture` lies inside a tower."""
    if unknown := set(capture) - {*known, soft}:
        choice = ", ".join((*known, soft))
        raise ValueError(f"cannot capture {sorted(unknown)}; choose from {choice}")
    return frozenset(capture) - {soft}
