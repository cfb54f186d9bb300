"""Small sounds for tests."""

import io

import numpy as np
import soundfile


def tone(seconds: float = 0.5, rate: int = 16_000, hertz: float = 440) -> np.ndarray:
    """float32 `[samples]`: a tone of half the full scale."""
    times = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * hertz * times)).astype(np.float32)


def written(samples: np.ndarray, rate: int = 16_000, form: str = "WAV", **options) -> bytes:
    """The bytes of a file of this format."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, **options)
    return file.getvalue()
