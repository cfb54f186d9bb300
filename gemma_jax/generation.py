"""Text in, text out: completions, streams, conversations."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import jax

from gemma_jax.matformer import Slice
from gemma_jax.model import Gemma
from gemma_jax.prompts import Messages, PromptReader, encode_prompt_images, is_chat
from gemma_jax.sampling import Sampling
from gemma_jax.session import CHUNK, Session
from gemma_jax.speculation import DRAFT_TOKENS, SpeculativeSession
from gemma_jax.text import StopText, StreamDecoder, Tokenizer, images_of, render_next
from gemma_jax.vision.pan_and_scan import PanAndScan
from gemma_jax.vision.prompt import Prompt

Progress = Callable[[int, int], None]  # tokens of prompt read so far, in total


@dataclass
class Completion:
    """What a model wrote after one prompt; `str()` of it is the text.

    Attributes:
      text: The continuation, without special tokens, cut before a stop text; empty if there was no
        tokenizer.
      token_ids: New tokens, a stop token included.
      prompt_token_ids: What the model was given.
      finish_reason: `"stop"` (stop token or stop text) or `"length"`.
      log_probs: Log-probability of each new token under the model, before sampling rules; nats.
      proposed_drafts, accepted_drafts: With a draft model, how many tokens it proposed, and how
        many of them were kept.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    log_probs: list[float] = field(default_factory=list)
    proposed_drafts: int = 0
    accepted_drafts: int = 0

    def __str__(self) -> str:
        return self.text


def generate(
    model: Gemma,
    tokenizer: Tokenizer | None,
    prompt: str | Messages | Prompt | Sequence[str | Messages | Prompt | Sequence[int]],
    *,
    images: Sequence | None = None,
    pan_and_scan: PanAndScan | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    stop: Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
    on_text: Callable[[int, str], None] | None = None,
    draft: Gemma | Slice | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    **sampling_fields: float,
) -> Completion | list[Completion]:
    """Continues one prompt, or a batch of prompts of any lengths.

    Args:
      prompt: One text (BOS is added once), chat messages (dicts with `role` and `content`, see
        `gemma_jax.text.chat`) or `Prompt`; or a list of these, or of lists of token ids, which are
        taken as they are and need no tokenizer.
      images: Images of one text, or one list of images per text of a batch: files, arrays, or
        whatever else `Image` takes. They go where the text says `<start_of_image>`, or in front of
        it. Messages hold theirs in their content.
      pan_and_scan: Adds crops of elongated images; `None` for none.
      max_new_tokens: Bound on the continuation; the context of the model may end before.
      sampling: How to choose tokens, or its fields directly (`temperature=0.7, top_k=64`).
        Default: greedy.
      seed: One integer, or one per prompt. The same seed and prompt give the same text, also
        inside a larger batch.
      stop: Texts that end the continuation; they are not part of it.
      stop_ids: Tokens that end it. Default: the tokenizer's (1 and 106 for Gemma 3).
      chunk: Longest stretch of prompt read in one pass.
      progress: Told how much of the prompt has been read.
      on_text: Called with row number and new text as it appears; whole characters only.
      draft: Speculates: this slice of the model (or another, smaller model) proposes tokens, and
        the model checks several at once. The text stays the model's; see `gemma_jax.speculation`.
      draft_tokens: How many at once.

    Returns:
      One `Completion`, or a list of them for a batch.

    Raises:
      ValueError: Empty prompt, ids outside the vocabulary, a prompt that leaves no room in the
        context, impossible sampling values, images that cannot be read or do not fit the text.
    """
    single = isinstance(prompt, (str, Prompt)) or is_chat(prompt)
    given = [prompt] if single else list(prompt)
    if not given:
        raise ValueError("no prompt given; give at least one")
    read = PromptReader(tokenizer, model.cfg, pan_and_scan)
    prompts = read.all(given, [images] if single else images)
    rows = [p.token_ids for p in prompts]
    if stop_ids is None:
        stop_ids = tokenizer.stop_ids if tokenizer is not None else ()
    if stop and tokenizer is None:
        raise ValueError("stop texts need a tokenizer; give one, or stop_ids")
    longest = max(len(row) for row in rows)
    new = min(max_new_tokens, model.cfg.max_positions - longest)
    if max_new_tokens > 0 and new < 1:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room in the model's context of "
            f"{model.cfg.max_positions}; shorten it"
        )
    kind = Session
    if draft is not None:
        kind = partial(SpeculativeSession, draft=draft, draft_tokens=draft_tokens)
    session = kind(
        model,
        len(rows),
        longest + new,
        sampling=_resolve(sampling, sampling_fields),
        seeds=seed,
        stop_ids=stop_ids,
        chunk=chunk,
    )
    streaming = on_text is not None or bool(stop)
    soft = [encode_prompt_images(model, p) for p in prompts]
    session.read(rows, soft=soft, max_new_tokens=new, run=not streaming, progress=progress)
    writers = [_Writer(tokenizer, stop, session.stop_ids) for _ in rows]
    for chosen in _steps(session, new, streaming):
        for i, (writer, ids) in enumerate(zip(writers, chosen)):
            text = writer.extend(ids)
            if text and on_text is not None:
                on_text(i, text)
            if writer.stopped:
                session.stop(i)
    done = session.done
    for i, writer in enumerate(writers):
        if (text := writer.close()) and on_text is not None:
            on_text(i, text)
    completions = [
        Completion(w.text, ids[: w.count], row, "stop" if ended else "length", log_probs[: w.count])
        for w, ids, row, ended, log_probs in zip(
            writers, session.chosen, rows, done, session.log_probs
        )
    ]
    if draft is not None:
        for done, *done_drafts in zip(completions, session.proposed, session.accepted):
            done.proposed_drafts, done.accepted_drafts = done_drafts
    return completions[0] if single else completions


class Conversation:
    """A chat whose cache is kept between turns: each turn reads only what is new.

    Args:
      model, tokenizer: From `gemma_jax.load`; an instruction-tuned checkpoint answers best.
      max_len: Tokens the whole conversation may take; default 8,192, or the model's context.
      system: Text put in front of the first user message.
      sampling, seed: As in `generate`; default: what the published checkpoints recommend,
        temperature 1, top-k 64, top-p 0.95.
      pan_and_scan: As in `generate`.
    """

    def __init__(
        self,
        model: Gemma,
        tokenizer: Tokenizer,
        *,
        max_len: int | None = None,
        system: str | None = None,
        sampling: Sampling | None = None,
        seed: int = 0,
        pan_and_scan: PanAndScan | None = None,
    ):
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.messages: list[Mapping[str, object]] = []
        self._read = PromptReader(tokenizer, model.cfg, pan_and_scan)
        self._session = Session(
            model,
            1,
            max_len or min(8192, model.cfg.max_positions),
            sampling=sampling or Sampling(temperature=1.0, top_k=64, top_p=0.95),
            seeds=seed,
            stop_ids=tokenizer.stop_ids,
        )

    def stream(self, content: str | Sequence, *, max_new_tokens: int = 1024) -> Iterator[str]:
        """Says `content`, text or a list of texts and images, and yields the answer as it comes.

        Raises:
          ValueError: The conversation has outgrown `max_len`, or an image cannot be read.
        """
        first = not self.messages
        message = {"role": "user", "content": content}
        system = {"role": "system", "content": self.system} if first and self.system else None
        text = render_next(message, first=first, system=system)
        prompt = self._read.text(text, images_of([message]), bos=False)
        ids = prompt.token_ids
        room = self._session.room - len(ids) - 1
        if room < 1:
            raise ValueError(
                f"the conversation has outgrown its {self._session.max_len} tokens; start a new "
                "one, or give a larger max_len"
            )
        new = min(max_new_tokens, room)
        soft = [encode_prompt_images(self.model, prompt)]
        self._session.read([ids], soft=soft, max_new_tokens=new)
        writer = _Writer(self.tokenizer, (), self._session.stop_ids)
        try:
            for chosen in _steps(self._session, new, True):
                if piece := writer.extend(chosen[0]):
                    yield piece
            if piece := writer.close():
                yield piece
        finally:  # also when the reader stops listening half-way
            answer = {"role": "assistant", "content": writer.text}
            self.messages += [message, answer]

    def say(self, content: str | Sequence, *, max_new_tokens: int = 1024) -> str:
        """Says `content` and returns the whole answer."""
        return "".join(self.stream(content, max_new_tokens=max_new_tokens))


class _Writer:
    """Text of one row as its tokens come in: whole characters, no stop token, no stop text."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], stop_ids: tuple[int, ...]):
        self.text, self.count = "", 0  # and the number of tokens it came from
        self._decoder = StreamDecoder(tokenizer, skip_special=True) if tokenizer else None
        self._guard, self._stop_ids = StopText(stop), stop_ids

    @property
    def stopped(self) -> bool:
        return self._guard.matched is not None

    def extend(self, ids: list[int]) -> str:
        """New text, given all tokens of the row so far."""
        new = []
        for i in ids[self.count :]:
            if self.stopped:
                break
            self.count += 1
            if self._decoder is not None and i not in self._stop_ids:
                new.append(self._emit(self._decoder.push([i])))
        return "".join(new)

    def close(self) -> str:
        """What was held back, when no more tokens come."""
        if self._decoder is None:
            return ""
        text = self._emit(self._decoder.flush())
        rest = self._guard.flush()
        self.text += rest
        return text + rest

    def _emit(self, text: str) -> str:
        text = self._guard.push(text)
        self.text += text
        return text


def _steps(session: Session, limit: int, streaming: bool) -> Iterator[list[list[int]]]:
    """Tokens chosen so far, again and again until there are `limit` or all rows are done.

    Streaming asks for one token more at a time where a token is slow (CPU), and for as many as
    take about 50 ms where it is fast, so that the calls themselves never count.
    """
    step, burst = 1 if streaming else limit, 1
    while True:
        start = time.perf_counter()
        yield session.write(step)
        if step >= limit or all(session.done):
            return
        if jax.process_count() > 1:
            burst = 8  # all processes must ask for the same
        else:
            pace = (time.perf_counter() - start) / burst
            burst = min(max(1, int(0.05 / max(pace, 1e-6))), 2 * burst, 32)
        step = min(step + burst, limit)


def _resolve(sampling: Sampling | None, fields: Mapping[str, float]) -> Sampling:
    if sampling is not None and fields:
        raise ValueError(f"give sampling, or its fields {sorted(fields)}, not both")
    return sampling or Sampling(**fields)
