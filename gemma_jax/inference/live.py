"""What is said, written down while it is said."""

import time

import numpy as np

from gemma_jax.audio.encoder import longest_clip
from gemma_jax.audio.waves import Audio, mono_piece, settled_after, split_at_quiet
from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.generate import generate
from gemma_jax.inference.transcribe import MAX_NEW_TOKENS, Segment, Transcript, instruction
from gemma_jax.multimodal.audio_prompt import require_audio
from gemma_jax.multimodal.audio_stream import audio_stream
from gemma_jax.multimodal.encode import audio_filling
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.prompts import Prompt, PromptReader
from gemma_jax.text import Tokenizer, chat_stop_ids


class LiveTranscript:
    """Writes down what is said while it is said: `push` samples as they come, and `finish`.

    The tower hears each sound once. Whenever it has made new soft tokens, the model reads its
    question and all soft tokens so far, the places of those to come filled as behind the end of a
    clip, and writes anew: words may change while what follows them is heard. What `finish` returns
    is what `transcribe` writes of the whole clip.

    Args:
      model: One that hears, trained on instructions.
      tokenizer: Its own.
      language, translate_to, max_new_tokens: As in `transcribe`.
      tokens_per_step: The model writes anew after so many soft tokens, of 160 ms each.

    Attributes:
      transcript: Of what was heard so far; `seconds` of its last segment is how long that took to
        write.

    Raises:
      ValueError: The model does not hear.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> gj.LiveTranscript(model, tok)
      Traceback (most recent call last):
      ...
      ValueError: this model has no audio tower; sounds need one that has, such as gemma3n-e2b-it
    """

    def __init__(
        self,
        model: Gemma,
        tokenizer: Tokenizer,
        *,
        language: str | None = None,
        translate_to: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        tokens_per_step: int = 1,
    ):
        sounds = require_audio(model.cfg.audio).sounds
        self._model, self._tokenizer = model, tokenizer
        self._max_new_tokens, self._tokens_per_step = max_new_tokens, tokens_per_step
        self._rate = sounds.sampling_rate
        self._limit = round(longest_clip(model.cfg.audio) * self._rate)
        any_clip = Audio(np.zeros(1, np.float32), sampling_rate=self._rate)
        reader = PromptReader(tokenizer, modalities_of(model.cfg))
        (prompt,) = reader.all([[instruction(language, translate_to), any_clip]])
        self._prompt_ids = prompt.token_ids
        self._filling_D = np.asarray(audio_filling(model))
        self.transcript, self._finished = Transcript([]), False
        self._begin([], 0, np.zeros(0, np.float32))

    def push(self, samples: np.ndarray) -> Transcript:
        """Takes samples at the rate of the model; returns `transcript`.

        Args:
          samples: An array as `Audio` takes it, floats in [-1, 1] or integers; may be empty.

        Raises:
          ValueError: What `Audio` refuses, or the clip has ended.
        """
        if self._finished:
            raise ValueError("this clip has ended; begin another")
        self._samples = np.concatenate([self._samples, mono_piece(samples, self._rate)])
        settled = settled_after(self._limit / self._rate, self._rate)
        while len(self._samples) >= settled:
            self._end(len(self._parts(self._samples[:settled])[0]))
        self._hear(min(len(self._samples), self._limit))
        return self.transcript

    def finish(self) -> Transcript:
        """Ends the clip; returns the transcript of all of it."""
        self._finished = True
        for part in self._parts(self._samples):
            self._end(len(part))
        return self.transcript

    def _parts(self, samples: np.ndarray) -> list[np.ndarray]:
        """Stretches that the model hears at once."""
        if not len(samples):
            return []
        clip = Audio(samples, sampling_rate=self._rate)
        return [part.samples for part in split_at_quiet(clip, self._limit / self._rate)]

    def _begin(self, ended: list[Segment], first: int, samples: np.ndarray) -> None:
        """Begins a stretch at sample `first` of the clip."""
        self._ended, self._first, self._samples = ended, first, samples
        self._stream = audio_stream(self._model, tokens_per_step=self._tokens_per_step)
        self._heard, self._soft_TD = 0, self._filling_D[None, :][:0]

    def _hear(self, end: int) -> None:
        """Hears the samples of the stretch up to `end`, and writes if that gave soft tokens."""
        soft_TD = self._stream.push(self._samples[self._heard : end])
        self._heard = max(end, self._heard)
        self._soft_TD = np.concatenate([self._soft_TD, soft_TD])
        if len(soft_TD):
            self._write()

    def _end(self, length: int) -> None:
        """Ends the stretch after so many samples, and begins the next."""
        if self._heard > length:  # what lies behind the cut is not to count: once more
            self._begin(self._ended, self._first, self._samples)
        rest = self._stream.push(self._samples[self._heard : length]), self._stream.finish()
        self._heard, self._soft_TD = length, np.concatenate([self._soft_TD, *rest])
        self._write()
        self._begin(self.transcript.segments, self._first + length, self._samples[length:])

    def _write(self) -> None:
        begun = time.perf_counter()
        ids = self._prompt_ids
        places = sum(ids.count(one.placeholder) for one in modalities_of(self._model.cfg))
        filling_TD = np.tile(self._filling_D, (places - len(self._soft_TD), 1))
        prompt = Prompt(ids, soft=[np.concatenate([self._soft_TD, filling_TD])])
        limit = self._max_new_tokens
        stops = chat_stop_ids(self._tokenizer)
        done = generate(self._model, self._tokenizer, prompt, max_new_tokens=limit, stop_ids=stops)
        segment = Segment(
            start=self._first / self._rate,
            end=(self._first + self._heard) / self._rate,
            text=done.text.strip(),
            finish_reason=done.finish_reason,
            seconds=time.perf_counter() - begun,
        )
        self.transcript = Transcript([*self._ended, segment])
