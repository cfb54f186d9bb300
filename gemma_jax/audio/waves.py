"""Sounds in: whatever the user holds becomes one row of samples, and long clips become short ones.

Decoding needs soundfile, and changing the rate soxr (the extra `audio`); both are imported at first
use. Files are taken for hostile: what their headers say is checked before anything is decoded, they
are read block by block, and whatever is wrong with one is a `ValueError` of one line that names it.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from soundfile import SoundFile

# Of what libsndfile decodes, the formats that people hold; OGG is Vorbis or Opus.
FORMATS = ("AIFF", "FLAC", "MP3", "OGG", "WAV", "WAVEX")
MIN_RATE, MAX_RATE = 1_000, 768_000  # samples per second
MAX_CHANNELS = 64
MAX_SAMPLES = 2**28  # per channel: a gigabyte, an hour and a half at 48 kHz
MAX_SECONDS = 4 * 3600
MAX_LEVEL = 64.0  # full scale is 1; recordings in floats pass it a little, 16-bit numbers by far
BLOCK = 2**16  # samples per channel that are decoded at a time
STREAMED = 0x7FFF_F000  # programs that write WAV to a pipe declare at least so many bytes
UNKNOWN = 2**63 - 1  # what libsndfile says of lengths that the header does not tell
MP3_FRAME = 1152  # samples by which the length of an MP3, where it is guessed, may be too large
QUIET_SECONDS = 0.1  # how long a pause has to be to be worth a cut


class Audio:
    """Reads one clip of sound from a file, bytes or an array: decoded, mono and checked.

    Channels are averaged. Integers are scaled so that full scale is 1; floats stay as they are.

    Args:
      source: Path of a file (WAV, FLAC, MP3, OGG, AIFF), its bytes, another `Audio`, samples, or a
        pair of samples and their rate. Samples are an array `[samples]` or `[samples, channels]` of
        int16, int32, int8, uint8 (silence is 128) or floats.
      sampling_rate: Samples per second of an array; files know theirs.

    Attributes:
      samples: float32 `[samples]`, read-only.
      sampling_rate: Samples per second.

    Raises:
      ValueError: `source` is no sound, is broken, cut off, empty, too long, or not finite.
      FileNotFoundError: There is no such file.
      ImportError: soundfile or soxr is missing.

    Examples:
      >>> import gemma_jax as gj
      >>> import numpy as np
      >>> tone = np.sin(2 * np.pi * 440 * np.arange(24_000) / 48_000)
      >>> clip = gj.Audio(tone, sampling_rate=48_000)
      >>> clip
      Audio(0.50 s at 48000 Hz)
      >>> clip.at(16_000).samples.shape
      (8000,)
    """

    samples: np.ndarray
    sampling_rate: int

    def __init__(
        self,
        source: "str | os.PathLike | bytes | np.ndarray | tuple[np.ndarray, int] | Audio",
        *,
        sampling_rate: int | None = None,
    ):
        self.samples, self.sampling_rate = _read(source, sampling_rate)
        self.samples.setflags(write=False)

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.sampling_rate

    def at(self, sampling_rate: int) -> "Audio":
        """Resamples the clip, with a filter against aliasing; its length stays, to a sample.

        Raises:
          ValueError: No such rate, or the clip would become too long.
          ImportError: soxr is missing.
        """
        rate = _checked_rate(sampling_rate, "the rate asked for")
        if rate == self.sampling_rate:
            return self
        _check_length(max(1, int(self.seconds * rate)), rate, "the resampled clip")
        resampled = _soxr().resample(self.samples, self.sampling_rate, rate)
        # Less than half a sample is left of the shortest clips.
        return Audio(resampled if len(resampled) else np.zeros(1, np.float32), sampling_rate=rate)

    def __repr__(self) -> str:
        return f"Audio({self.seconds:.2f} s at {self.sampling_rate} Hz)"


def mono_piece(samples: np.ndarray, rate: int) -> np.ndarray:
    """float32 `[samples]` of a piece of sound as `Audio` reads it, but that it may be empty."""
    if not (hasattr(samples, "__array__") or isinstance(samples, list)):
        kind = type(samples).__name__
        raise ValueError(f"expected samples at {rate} Hz as an array, got {kind}")
    array = np.atleast_1d(samples)
    return Audio(array, sampling_rate=rate).samples if len(array) else np.zeros(0, np.float32)


def split_at_quiet(audio: Audio, max_seconds: float = 30) -> list[Audio]:
    """Cuts a long clip where it is quietest, so that no part is longer than `max_seconds`.

    A cut lies in the middle of the tenth of a second with the least energy, within the last third
    of what a part may hold; of equal ones, the last. Joined, the parts are the whole. To have parts
    of a length in samples of another rate, change the rate before: `audio.at(rate)`.
    """
    limit = int(max_seconds * audio.sampling_rate)
    if limit < 1:
        raise ValueError(f"max_seconds={max_seconds} must hold a sample at least")
    parts, rest = [], audio.samples
    while len(rest) > limit:
        cut = _quietest(rest, limit, audio.sampling_rate)
        parts.append(rest[:cut])
        rest = rest[cut:]
    rate = audio.sampling_rate
    return [Audio(part, sampling_rate=rate) for part in [*parts, rest]] if parts else [audio]


def settled_after(max_seconds: float, rate: int) -> int:
    """How many samples of a clip say where `split_at_quiet` cuts it first, whatever follows."""
    limit = int(max_seconds * rate)
    return limit + max(_crumb(limit), _half_pause(rate))


def _crumb(limit: int) -> int:
    """What is too short to be a part of its own, where a part may hold `limit`."""
    return limit // 30


def _half_pause(rate: int) -> int:
    return max(1, int(QUIET_SECONDS * rate / 2))


def _quietest(samples: np.ndarray, limit: int, rate: int) -> int:
    """Where to cut `samples`, which are more than `limit`."""
    end = min(limit, max(1, len(samples) - _crumb(limit)))
    begin = min(end, max(1, limit - limit // 3))
    half = _half_pause(rate)
    first = max(0, begin - half)
    power = np.square(samples[first : end + half], dtype=np.float64)
    energy = np.concatenate([[0.0], np.cumsum(power)])
    cuts = np.arange(begin, end + 1) - first
    around = energy[np.minimum(cuts + half, len(power))] - energy[np.maximum(cuts - half, 0)]
    return end - int(np.argmin(around[::-1]))


def _read(source, rate: int | None) -> tuple[np.ndarray, int]:
    """float32 `[samples]`, and how many make a second."""
    if isinstance(source, tuple) and len(source) == 2 and rate is None:
        source, rate = source
    elif not hasattr(source, "__array__") and rate is not None:
        raise ValueError("sampling_rate goes with an array of samples; a file or a clip knows its")
    if isinstance(source, Audio):
        return source.samples, source.sampling_rate
    if isinstance(source, (str, os.PathLike)):
        return _read_path(os.fspath(source))
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read_bytes(source, "the sound given as bytes")
    if hasattr(source, "__array__"):
        if rate is None:
            raise ValueError("an array of samples needs its rate, such as sampling_rate=16000")
        return _from_array(np.asarray(source), rate)
    kind = type(source).__name__
    raise ValueError(
        f"expected a sound as a path, bytes, an array, or (samples, sampling rate); got {kind}"
    )


def _read_path(path: str) -> tuple[np.ndarray, int]:
    if path.startswith(("http://", "https://", "data:")):
        raise ValueError(f"{path:.80} is no path: download the sound, and give the file")
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise ValueError(f"{path} is no regular file")  # reading a pipe could wait forever
    with open(path, "rb") as file:
        return _read_file(file, path)


def _read_bytes(data, name: str) -> tuple[np.ndarray, int]:
    with tempfile.TemporaryFile() as file:  # the decoders read files; calls back are slow, and fail
        file.write(data)
        file.seek(0)
        return _read_file(file, name)


def _read_file(file: BinaryIO, name: str) -> tuple[np.ndarray, int]:
    size = os.fstat(file.fileno()).st_size
    if not size:
        raise ValueError(f"{name} is empty; expected a sound")
    with _opened(file, name) as sound:
        _check_header(sound, name)
        with _decoding(name):
            blocks = list(_mono_blocks(sound, name))
        left = size - os.lseek(file.fileno(), 0, os.SEEK_CUR)
        _check_end(sound, sum(map(len, blocks)), left / size, name)
    return np.concatenate(blocks), sound.samplerate


@contextmanager
def _opened(file: BinaryIO, name: str) -> Iterator["SoundFile"]:
    soundfile = _soundfile()
    try:  # by its number: a name that ends in .raw would be read as something else
        sound = soundfile.SoundFile(file.fileno(), closefd=False)
    except soundfile.LibsndfileError as error:
        expected = ", ".join(FORMATS)
        reason = error.error_string.rstrip(".")
        raise ValueError(
            f"{name} is no sound that can be read ({reason}); expected {expected}"
        ) from None
    # Else soundfile seeks after each block: in MP3 that leaves seams, in long FLAC it fails.
    sound.seekable = lambda: False
    with sound:
        yield sound


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """What a decoder throws at bytes that somebody else made, as one line."""
    soundfile = _soundfile()
    try:
        yield
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", str(error)).rstrip(".")
        raise ValueError(f"{name} is a broken sound file, or is cut off ({reason})") from None


def _mono_blocks(sound: "SoundFile", name: str) -> Iterator[np.ndarray]:
    length = 0
    while len(block := sound.read(BLOCK, "float32", always_2d=True)):
        length += len(block)
        _check_length(length, sound.samplerate, name)
        yield _mono(block, name)


def _check_header(sound: "SoundFile", name: str) -> None:
    if sound.format not in FORMATS:
        raise ValueError(f"{name} is of format {sound.format}; expected {', '.join(FORMATS)}")
    _checked_rate(sound.samplerate, name)
    _check_channels(sound.channels, name)
    # Of a file that is cut off, libsndfile reads what is there and tells in its log alone.
    log = sound.extra_info
    missing = re.search(r"^ *(?:data|SSND) *: (\d+) \(should be", log, re.MULTILINE)
    whole = re.search(r"^RIFF *: (\d+)", log, re.MULTILINE)
    streamed = whole and missing and min(int(whole[1]), int(missing[1])) >= STREAMED
    if missing and not streamed:
        raise ValueError(f"{name} is cut off: {int(missing[1]):,} bytes of samples are declared")
    if "end-of-stream" in log.lower():  # is missing in an OGG
        raise ValueError(f"{name} is cut off: its last page is missing")
    if sound.frames != UNKNOWN:
        _check_length(sound.frames, sound.samplerate, name)


def _check_end(sound: "SoundFile", length: int, left: float, name: str) -> None:
    """Holds what was decoded against what was declared; `left` is the unread share of the file."""
    _check_length(length, sound.samplerate, name)
    is_mp3 = sound.format == "MP3"
    if sound.frames != UNKNOWN and length < sound.frames - is_mp3 * MP3_FRAME:
        raise ValueError(
            f"{name} is cut off: {length:,} of the {sound.frames:,} samples declared are there"
        )
    if is_mp3 and left > 0.1:  # without a header, the length is guessed from the first bit rate
        raise ValueError(f"{name} is an MP3 file of unknown length; convert it to WAV or FLAC")


def _from_array(array: np.ndarray, rate: int) -> tuple[np.ndarray, int]:
    name = "the array of samples"
    rate = _checked_rate(rate, name)
    if array.ndim not in (1, 2):
        raise ValueError(
            f"{name} has shape {list(array.shape)}; expected [samples] or [samples, channels]"
        )
    if array.ndim == 2:
        first = array.shape[0] <= MAX_CHANNELS < array.shape[1]
        _check_channels(array.shape[1], name, "; transpose it: array.T" if first else "")
    _check_length(len(array), rate, name)
    return _mono(_to_float(array.reshape(len(array), -1), name), name).copy(), rate


def _to_float(values: np.ndarray, name: str) -> np.ndarray:
    """float32 in which full scale is 1."""
    kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
    if kind == "f":
        with np.errstate(over="ignore"):  # becomes infinite, which is refused
            return values.astype(np.float32)
    if kind == "i" and bits <= 32:
        return values.astype(np.float32) / np.float32(2 ** (bits - 1))
    if kind == "u" and bits == 8:
        return values.astype(np.float32) / np.float32(128) - np.float32(1)
    raise ValueError(
        f"{name} has dtype {values.dtype}; expected int16, int32, int8, uint8 or floats in [-1, 1]"
    )


def _mono(values: np.ndarray, name: str) -> np.ndarray:
    """The mean of the channels of float32 `[samples, channels]`, if all are sound."""
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):  # NaN is passed on by both
        raise ValueError(f"{name} has samples that are no finite numbers")
    if max(-low, high) > MAX_LEVEL:
        raise ValueError(
            f"{name} has floats from {low:g} to {high:g}; expected [-1, 1]: scale them, or give "
            "integers"
        )
    return values[:, 0] if values.shape[1] == 1 else values.mean(axis=1)


def _checked_rate(rate, name: str) -> int:
    if not isinstance(rate, Real) or isinstance(rate, bool) or not float(rate).is_integer():
        got = rate if isinstance(rate, Real) else type(rate).__name__
        raise ValueError(f"sampling_rate must be an integer, samples per second; got {got}")
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(
            f"{name} has {int(rate):,} samples per second; expected {MIN_RATE:,} to {MAX_RATE:,}"
        )
    return int(rate)


def _check_channels(channels: int, name: str, hint: str = "") -> None:
    if not 1 <= channels <= MAX_CHANNELS:
        raise ValueError(f"{name} has {channels:,} channels; expected 1 to {MAX_CHANNELS}{hint}")


def _check_length(samples: int, rate: int, name: str) -> None:
    if not samples:
        raise ValueError(f"{name} has no samples; expected a sound")
    if samples > MAX_SAMPLES or samples > MAX_SECONDS * rate:
        raise ValueError(
            f"{name} declares {samples:,} samples at {rate:,} Hz; expected at most "
            f"{MAX_SAMPLES:,}, and {MAX_SECONDS // 3600} hours; cut it into pieces"
        )


def _soundfile():
    try:
        import soundfile
    except (ImportError, OSError):  # the latter: there is no libsndfile
        raise ImportError('sounds need soundfile: pip install "gemma-jax[audio]"') from None
    return soundfile


def _soxr():
    try:
        import soxr
    except ImportError:
        raise ImportError('changing a rate needs soxr: pip install "gemma-jax[audio]"') from None
    return soxr
