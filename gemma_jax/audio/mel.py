"""From samples to log-mel frames, which the audio tower reads; whole, in batches, or as they come.

A frame sees `frame_length` samples and the one after them, which is dropped (hf
`Gemma3nAudioFeatureExtractor`, where other kinds of pre-emphasis need it). Everything is NumPy: the
numbers do not depend on the device. Near the floor the noise of the Fourier transform in float32
dominates, so compare `exp` of two results.

Local letters: I clips; M mel bands; W samples of a frame.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from gemma_jax.encoder_config import SoundProcessing

NUM_MELS = 128  # of the published models
BLOCK = 4096  # frames that are transformed at a time


def num_frames(num_samples: int, processing: SoundProcessing = SoundProcessing()) -> int:
    """Counts the mel frames of a clip by itself.

    Clips are filled up with silence to a multiple of `pad_multiple` samples, as in transformers,
    and those too short for a frame to one, where transformers has none. No samples, no frames.
    """
    return _complete(_padded_length(num_samples, processing), processing)


def log_mel(
    samples: np.ndarray,
    processing: SoundProcessing = SoundProcessing(),
    num_mels: int = NUM_MELS,
) -> np.ndarray:
    """Computes the mel frames of one clip by itself.

    Args:
      samples: float32 `[samples]`, at the rate of `processing`.
      processing: What becomes of them.
      num_mels: Bands.

    Returns:
      float32 `[T, num_mels]`, T by `num_frames`; natural logarithms of magnitudes.

    Raises:
      ValueError: No samples, or an array of another rank.
    """
    _check_samples(samples)
    padded = _padded_length(len(samples), processing)
    return _mel_frames(_filled(samples, padded), processing, num_mels)


def log_mel_batch(
    clips: Sequence[np.ndarray],
    processing: SoundProcessing = SoundProcessing(),
    num_mels: int = NUM_MELS,
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the mel frames of several clips as transformers does: all filled up to the longest.

    The mask marks the frames that begin within the clip: up to three more than the clip has by
    itself, which hold some of the silence after it. One clip is the same as in `log_mel`.

    Returns:
      float32 `[I, T, num_mels]`, and a mask, bool `[I, T]`.

    Raises:
      ValueError: No clips, or one that `log_mel` refuses.
    """
    for samples in clips:
        _check_samples(samples)
    if not clips:
        raise ValueError("expected one clip of sound at least")
    padded = max(_padded_length(len(samples), processing) for samples in clips)
    mel_ITM = np.stack(
        [_mel_frames(_filled(samples, padded), processing, num_mels) for samples in clips]
    )
    starts_T = np.arange(mel_ITM.shape[1]) * processing.hop_length
    return mel_ITM, starts_T < np.array([len(samples) for samples in clips])[:, None]


class MelStream:
    """Computes mel frames while the samples come, in pieces of any length.

    All that comes out, one after the other, is `log_mel` of all that went in. The state is the
    samples that the next frame shares with the last: 353 of Gemma 3n's, and what has come since.
    """

    def __init__(
        self, processing: SoundProcessing = SoundProcessing(), num_mels: int = NUM_MELS
    ) -> None:
        self.processing, self.num_mels = processing, num_mels
        self.num_samples = self.num_frames = 0
        self.ended = False
        self._waiting = np.zeros(0, np.float32)

    def push(self, samples: np.ndarray) -> np.ndarray:
        """Takes samples, float32 `[samples]`; returns the frames now complete, `[T, num_mels]`."""
        if self.ended:
            raise ValueError("this stream has ended; begin another")
        _check_samples(samples, least=0)
        self.num_samples += len(samples)
        self._waiting = np.concatenate([self._waiting, samples.astype(np.float32)])
        mel_TM = _mel_frames(self._waiting, self.processing, self.num_mels)
        self.num_frames += len(mel_TM)
        self._waiting = self._waiting[len(mel_TM) * self.processing.hop_length :].copy()
        return mel_TM

    def finish(self) -> np.ndarray:
        """Ends the clip; returns the frames that the silence after it completes."""
        padded = _padded_length(self.num_samples, self.processing)
        mel_TM = self.push(np.zeros(padded - self.num_samples, np.float32))
        self.ended = True
        return mel_TM


@lru_cache(maxsize=8)
def mel_filters(processing: SoundProcessing, num_mels: int) -> np.ndarray:
    """Triangles over the points of the transform, equally wide on the mel scale of HTK.

    Returns:
      float64 `[fft_length / 2 + 1, num_mels]`, read-only.
    """
    lowest, highest = (
        2595 * np.log10(1 + f / 700) for f in (processing.min_frequency, processing.max_frequency)
    )
    corners = 700 * (10 ** (np.linspace(lowest, highest, num_mels + 2) / 2595) - 1)
    points = np.arange(processing.fft_length // 2 + 1) * (
        processing.sampling_rate / processing.fft_length
    )
    distances, widths = corners - points[:, None], np.diff(corners)
    rising, falling = -distances[:, :-2] / widths[:-1], distances[:, 2:] / widths[1:]
    filters = np.maximum(0, np.minimum(rising, falling))
    filters.setflags(write=False)
    return filters


def _mel_frames(samples: np.ndarray, processing: SoundProcessing, num_mels: int) -> np.ndarray:
    """float32 `[T, num_mels]` of the frames that are complete in `samples`."""
    mel_TM = np.empty((_complete(len(samples), processing), num_mels), np.float32)
    if len(mel_TM):
        windows = np.lib.stride_tricks.sliding_window_view(samples, processing.frame_length + 1)
        frames_TW = windows[:: processing.hop_length]
        for start in range(0, len(mel_TM), BLOCK):
            block = slice(start, start + BLOCK)
            mel_TM[block] = _transformed(frames_TW[block], processing, num_mels)
    return mel_TM


def _transformed(frames_TW: np.ndarray, processing: SoundProcessing, num_mels: int) -> np.ndarray:
    share = np.float32(processing.preemphasis)
    emphasised_TW = frames_TW[:, :-1].copy()
    emphasised_TW[:, 1:] -= share * frames_TW[:, :-2]
    emphasised_TW[:, 0] *= np.float32(1 - processing.preemphasis)  # as if it had come before, too
    emphasised_TW *= _hann(processing.frame_length)
    spectrum = np.fft.rfft(emphasised_TW, processing.fft_length)
    mel_TM = np.abs(spectrum) @ mel_filters(processing, num_mels)
    return np.log(np.maximum(mel_TM, processing.mel_floor))


@lru_cache(maxsize=8)
def _hann(length: int) -> np.ndarray:
    """A periodic window, float32."""
    angles = 2 * np.pi * np.arange(length, dtype=np.float32) / length
    return (0.5 * (1 - np.cos(angles))).astype(np.float32)


def _complete(num_samples: int, processing: SoundProcessing) -> int:
    """Frames that fit into so many samples."""
    return max(0, (num_samples - processing.frame_length - 1) // processing.hop_length + 1)


def _padded_length(num_samples: int, processing: SoundProcessing) -> int:
    least = min(num_samples, 1) * (processing.frame_length + 1)
    multiple = processing.pad_multiple
    return -(-max(num_samples, least) // multiple) * multiple


def _filled(samples: np.ndarray, length: int) -> np.ndarray:
    filled = np.zeros(length, np.float32)
    filled[: len(samples)] = samples
    return filled


def _check_samples(samples: np.ndarray, least: int = 1) -> None:
    shape = np.shape(samples)
    if len(shape) != 1 or shape[0] < least:
        empty = ", not empty" if least else ""
        raise ValueError(f"expected samples as an array [samples]{empty}; got {list(shape)}")
    if (dtype := np.asarray(samples).dtype).kind != "f":
        raise ValueError(
            f"expected samples as floats in [-1, 1], got {dtype}; Audio scales integers"
        )
