"""A text with audio clips becomes token ids and mel frames, as the official processor makes them.

Where a clip goes, the text has the placeholder `<audio_soft_token>`. It grows into

    \\n\\n<start_of_audio> <audio_soft_token> x 188 <end_of_audio>\\n\\n

(transformers `Gemma3nProcessor`). A clip that is longer than the model hears at once is cut at
quiet places, and each piece is such a run.

Local letters: I items that soft tokens come in; M mel bands.
"""

import warnings
from functools import partial

import jax
import numpy as np

from gemma_jax.audio.encoder import frames_per_token, longest_clip, num_tokens
from gemma_jax.audio.mel import log_mel
from gemma_jax.audio.waves import Audio, split_at_quiet
from gemma_jax.decoder.model import Gemma
from gemma_jax.encoder_config import AudioConfig
from gemma_jax.multimodal.encode import Clips, check_frames, encode_audio
from gemma_jax.multimodal.modality import Item, Modality, modality_of
from gemma_jax.text import GEMMA3N_MEDIA

MARKER = GEMMA3N_MEDIA["audio"]
BUCKET = 256  # frames; clips are filled up to a multiple, so that a program serves many lengths


@modality_of.register
def audio_modality(audio: AudioConfig, *, pad_audio: bool = True, **_: object) -> Modality:
    """How sounds enter the text of a Gemma 3n.

    Args:
      pad_audio: Every clip takes `num_soft_tokens` places, as in training; without, as many as it
        has soft tokens, which the published models were not trained for.
    """
    return Modality(
        name="audio",
        items="audio clips",
        marker=MARKER,
        placeholder=audio.audio_token,
        begin=audio.start_token,
        end=audio.end_token,
        tokens_per_item=audio.num_soft_tokens if pad_audio else None,
        bidirectional=False,
        prepare=partial(_prepare, audio=audio, pad=pad_audio),
        encode=partial(_encode, pad=pad_audio),
    )


def require_audio(audio: AudioConfig | None) -> AudioConfig:
    """`audio` itself; ValueError if there is none."""
    if audio is None:
        raise ValueError(
            "this model has no audio tower; sounds need one that has, such as gemma3n-e2b-it"
        )
    return audio


def heard_at_once(source: object, audio: AudioConfig) -> list[Audio]:
    """A clip at the model's rate, or the pieces of one that is too long to hear at once."""
    return split_at_quiet(Audio(source).at(audio.sounds.sampling_rate), longest_clip(audio))


def _prepare(source: object, *, audio: AudioConfig, pad: bool) -> Item:
    pieces = heard_at_once(source, audio)
    mels = [log_mel(piece.samples, audio.sounds, audio.num_mels) for piece in pieces]
    if len(mels) > 1:
        warnings.warn(
            f"a clip is longer than the {longest_clip(audio):g} s that the model hears at once; it "
            f"is read in {len(mels)} pieces, cut at quiet places",
            stacklevel=2,
        )
    counts = [audio.num_soft_tokens if pad else num_tokens(len(mel), audio) for mel in mels]
    return Item(f"\n\n{MARKER}\n\n" * len(mels), counts, mels)


def _encode(model: Gemma, clips: Clips | jax.Array, *, pad: bool) -> jax.Array:
    """Of mel frames `[I, T, M]`, or `Clips`."""
    if isinstance(clips, Clips) or isinstance(clips, jax.core.Tracer):
        return encode_audio(model, clips, pad=pad)[0]
    check_frames(clips, model.cfg.audio)
    I, T, _ = clips.shape
    most = model.cfg.audio.num_soft_tokens * frames_per_token(model.cfg.audio)
    mel_ITM = np.pad(clips, ((0, 0), (0, max(0, min(-T % BUCKET, most - T))), (0, 0)))
    soft_ITD, _ = encode_audio(model, Clips(mel_ITM, np.full(I, T, np.int32)), pad=pad)
    return soft_ITD if pad else soft_ITD[:, : num_tokens(T, model.cfg.audio)]
