"""Clips of spoken digits: many voices, accents and speeds, in noise, loud and low.

The last voices are held out: no clip to train on has any of them, in whatever accent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemma_jax.audio.waves import Audio
from gemma_jax.experiments.spoken.espeak import Speaker, Voice

RATE, SECONDS = 16_000, 2.56  # samples per second, and the longest clip
WORDS = "zero one two three four five six seven eight nine".split()
AT_MOST = 4  # digits of a clip
ACCENTS = (
    "en", "en-us", "en-us-nyc", "en-029", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
)  # fmt: skip
HELD_OUT = ("m3", "m7", "f2", "f5", "Andrea", "Reed", "max", "shelby")
VOICES = (
    "", "m1", "m2", "m4", "m5", "m6", "m8", "f1", "f3", "f4", "adam", "Alex", "Alicia", "Andy",
    "anika", "Annie", "aunty", "belinda", "boris", "david", "Denis", "Diogo", "ed", "edward",
    "Gene", "grandma", "grandpa", "gustave", "Henrique", "Hugo", "ian", "iven", "john", "klatt",
    "klatt2", "klatt4", "Lee", "linda", "marcelo", "Mario", "Michael", "michel", "miguel", "Mike",
    "Nguyen", "norbert", "pablo", "paul", "pedro", "quincy", "rob", "robert", "sandro", "steph",
    "Storm", "travis", "victor", "zac",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Clip:
    """Sound and what is said in it.

    Attributes:
      samples: float32 `[samples]`, `RATE` of them per second.
      digits: In the order in which they are said.
      voice: Who says them, and how.
    """

    samples: np.ndarray
    digits: tuple[int, ...]
    voice: Voice

    @property
    def text(self) -> str:
        return "".join(map(str, self.digits))


def draw(
    random: np.random.Generator,
    speaker: Speaker,
    voices: Sequence[str] = VOICES,
    count: int | None = None,
) -> Clip:
    """A new clip of so many digits, or of one to `AT_MOST`."""
    count = count or int(random.integers(1, AT_MOST + 1))
    digits = tuple(int(digit) for digit in random.integers(10, size=count))
    while True:
        voice = Voice(
            accent=str(random.choice(ACCENTS)),
            variant=str(random.choice(voices)),
            rate=int(random.integers(120, 221)),
            pitch=int(random.integers(25, 76)),
            pitch_range=int(random.integers(20, 81)),
        )
        pauses = random.choice([" ", ", "], count, p=[0.75, 0.25])
        text = "".join(WORDS[digit] + pause for digit, pause in zip(digits, pauses)).rstrip(", ")
        speech = _trimmed(Audio(speaker.say(text, voice), sampling_rate=speaker.sampling_rate))
        before, after = (random.uniform([0.02, 0.1], 0.4) * RATE).astype(int)
        if before + len(speech) + after <= SECONDS * RATE:
            return Clip(_recorded(random, np.pad(speech, (before, after))), digits, voice)


def _trimmed(audio: Audio) -> np.ndarray:
    """Without the silence before and after, with 1 for the loudest sample."""
    samples = audio.at(RATE).samples
    samples = samples / np.abs(samples).max()
    heard = np.flatnonzero(np.abs(samples) > 0.01)
    return samples[heard[0] : heard[-1] + 1]


def _recorded(random: np.random.Generator, samples: np.ndarray) -> np.ndarray:
    """As a microphone might have it: with noise, white to brown, 10 to 50 dB below; at any level.

    Rounded to the steps of 16 bits.
    """
    spectrum = np.fft.rfft(random.standard_normal(len(samples)))
    color = np.maximum(1, np.arange(len(spectrum))) ** -random.uniform(0, 1)
    noise = np.fft.irfft(spectrum * color, len(samples))
    noise *= np.sqrt(np.mean(samples**2) / np.mean(noise**2)) * 10 ** -random.uniform(0.5, 2.5)
    heard = samples + noise
    heard *= 10 ** -random.uniform(0.05, 1.3) / np.abs(heard).max()
    return (np.round(heard * 32767) / 32768).astype(np.float32)
