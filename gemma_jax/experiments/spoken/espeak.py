"""Speech made by eSpeak NG: a text and a voice become samples.

The library comes in the wheel `espeakng-loader` (the extra `speech`); it is loaded when a speaker
is made, and only training and its tests need it. Its voices have noise in their breath: the same
text sounds a little different each time.
"""

import ctypes
from dataclasses import dataclass

import numpy as np

_SYNCHRONOUS, _DO_NOT_EXIT, _UTF8 = 2, 0x8000, 1
_RATE, _PITCH, _RANGE = 1, 3, 4  # of espeak_PARAMETER
_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@dataclass(frozen=True)
class Voice:
    """Says how a text is spoken.

    Attributes:
      accent: A language of eSpeak NG, such as `"en-us"`.
      variant: The speaker, such as `"f3"`; `""` for the voice of the language itself.
      rate: Words per minute, 80 to 450.
      pitch, pitch_range: 0 to 99; the latter is how lively the voice is.
    """

    accent: str
    variant: str = ""
    rate: int = 175
    pitch: int = 50
    pitch_range: int = 50

    @property
    def name(self) -> str:
        return f"{self.accent}+{self.variant}" if self.variant else self.accent


class Speaker:
    """Speaks; there is one engine in a process, so calls are one after the other.

    Attributes:
      sampling_rate: Samples per second.

    Raises:
      ImportError: espeakng-loader is missing.
      RuntimeError: The engine does not start.
    """

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError:
            raise ImportError('speech needs eSpeak NG: pip install "gemma-jax[speech]"') from None
        self._engine = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.sampling_rate = self._engine.espeak_Initialize(_SYNCHRONOUS, 0, data, _DO_NOT_EXIT)
        if self.sampling_rate <= 0:
            raise RuntimeError("eSpeak NG does not start; reinstall espeakng-loader")
        self._pieces: list[np.ndarray] = []
        self._callback = _Callback(self._take)  # kept: the engine holds but its address
        self._engine.espeak_SetSynthCallback(self._callback)

    def say(self, text: str, voice: Voice) -> np.ndarray:
        """int16 `[samples]`.

        Raises:
          ValueError: There is no such voice.
        """
        engine, spoken = self._engine, text.encode()
        if engine.espeak_SetVoiceByName(voice.name.encode()):
            raise ValueError(f"eSpeak NG has no voice {voice.name!r}")
        for parameter, value in (
            (_RATE, voice.rate), (_PITCH, voice.pitch), (_RANGE, voice.pitch_range)
        ):  # fmt: skip
            engine.espeak_SetParameter(parameter, value, 0)
        self._pieces.clear()
        engine.espeak_Synth(spoken, len(spoken) + 1, 0, 0, 0, _UTF8, None, None)
        engine.espeak_Synchronize()
        return np.concatenate([np.zeros(0, np.int16), *self._pieces])

    def _take(self, samples, count: int, events) -> int:
        """What the engine calls with each piece; 0 means to go on."""
        if samples and count:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0
