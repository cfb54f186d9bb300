"""Speech to text, by the prompts that Gemma 3n was published with."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.completion import check_model
from gemma_jax.inference.generate import generate
from gemma_jax.multimodal.audio_prompt import heard_at_once, require_audio
from gemma_jax.text import Tokenizer

MAX_NEW_TOKENS = 512  # for one piece; thirty seconds of fast speech are some 150


@dataclass(frozen=True)
class Segment:
    """Holds what was said in one stretch of a clip.

    Attributes:
      start, end: Where it lies in the clip, in seconds.
      text: What the model heard, and with a translation that after it.
      finish_reason: `"stop"`, or `"length"` if the text was cut off.
      seconds: How long that took.

    Examples:
      >>> import gemma_jax as gj
      >>> one = gj.Segment(start=0.0, end=1.2, text="four", finish_reason="stop", seconds=0.3)
      >>> f"{one.start} to {one.end}: {one.text}"
      '0.0 to 1.2: four'
    """

    start: float
    end: float
    text: str
    finish_reason: str
    seconds: float


@dataclass(frozen=True)
class Transcript:
    """Holds what was said in a clip; `str()` of it is the text.

    Attributes:
      segments: In order. There are several where the clip is longer than the model hears at once.

    Examples:
      >>> import gemma_jax as gj
      >>> first, second = (gj.Segment(t, t + 30, "and so on", "stop", 1.0) for t in (0, 30))
      >>> print(gj.Transcript([first, second]))
      and so on and so on
    """

    segments: list[Segment]

    @property
    def text(self) -> str:
        """All of it, stretches joined by spaces."""
        return " ".join(one.text for one in self.segments if one.text)

    def __str__(self) -> str:
        return self.text


def transcribe(
    model: Gemma,
    tokenizer: Tokenizer,
    audio: object,
    *,
    language: str | None = None,
    translate_to: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_segment: Callable[[Segment], None] | None = None,
) -> Transcript:
    """Writes down what is said in a clip of any length, greedily.

    A clip that is longer than the model hears at once is cut at quiet places, and each stretch is
    heard on its own.

    Args:
      model: One that hears, trained on instructions.
      audio: What `Audio` takes.
      language: That is spoken, in English: `"Spanish"`. Better named than not.
      translate_to: The model is to add the text in this language (its answer holds both).
      max_new_tokens: Bound on the text of one stretch.
      on_segment: Told of each stretch as soon as it is written down.

    Raises:
      ValueError: The model does not hear, or the sound cannot be read.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.Transcript([gj.Segment(0.0, 1.2, "four seven", "stop", 0.3)]).text
      'four seven'
    """
    check_model(model)
    cfg = require_audio(model.cfg.audio)
    rate = cfg.sounds.sampling_rate
    question = instruction(language, translate_to)
    segments, first = [], 0
    for piece in heard_at_once(audio, cfg):
        begun = time.perf_counter()
        done = generate(model, tokenizer, [question, piece], max_new_tokens=max_new_tokens)
        last = first + len(piece.samples)
        segment = Segment(
            start=first / rate,
            end=last / rate,
            text=done.text.strip(),
            finish_reason=done.finish_reason,
            seconds=time.perf_counter() - begun,
        )
        if on_segment is not None:
            on_segment(segment)
        segments.append(segment)
        first = last
    return Transcript(segments)


def instruction(language: str | None = None, translate_to: str | None = None) -> str:
    """What the model is asked, in front of the clip.

    The wording is that of Google's introduction of Gemma 3n for developers (June 2025), which has a
    language; without one it is left out.
    """
    for name in (language, translate_to):
        if name is None:
            continue
        if not isinstance(name, str) or not name.isprintable() or set(name) & set("<>"):
            raise ValueError(f"expected the name of a language, such as 'Spanish', got {name!r}")
    spoken = f" in {language}" if language else ""
    further = f", then translate it into {translate_to}" if translate_to else ""
    return f"Transcribe the following speech segment{spoken}{further}:"
