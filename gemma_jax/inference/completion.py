"""What is written after prompts: the one path of `generate`, `stream` and their command."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from inspect import signature
from numbers import Integral
from typing import Any

from gemma_jax.decoder.model import Gemma
from gemma_jax.field_types import check_keywords
from gemma_jax.inference.constrained import ConstrainedSession
from gemma_jax.inference.constraints import GrammarCompiler, GrammarConstraint
from gemma_jax.inference.grammar import Grammar
from gemma_jax.inference.logits_processors import LogitsProcessor
from gemma_jax.inference.sampling import Sampling
from gemma_jax.inference.session import Session
from gemma_jax.inference.speculation import SpeculativeSession
from gemma_jax.inference.text_writer import TextWriter, split_stops, write
from gemma_jax.matformer import Slice
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.prompts import Prompt, PromptReader, encode_prompt, is_chat, is_content
from gemma_jax.text import Tokenizer, chat_stop_ids

Progress = Callable[[int, int], None]  # tokens of prompt read so far, in total


@dataclass(frozen=True)
class Completion:
    """Holds what a model wrote after one prompt; `str()` of it is the text.

    Attributes:
      text: The continuation, without special tokens, cut before a stop text; empty if there was no
        tokenizer.
      token_ids: New tokens, a stop token included.
      prompt_token_ids: What the model was given.
      finish_reason: `"stop"` (stop token or stop text), `"length"`, or `"unfinished"` of a stream
        that was not read to its end (yet).
      log_probs: Log-probability of each new token under the model, before sampling rules; nats.
      proposed_drafts, accepted_drafts: With a draft model, how many tokens it proposed, and how
        many of them were kept.
      parsed: With a pydantic model as `schema`, the object; `None` if the text was cut.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> picture = "checkpoints/digits/three.png"
      >>> done = gj.generate(model, tok, "Read the digits.", images=[picture])
      >>> done.text, done.finish_reason, len(done.token_ids), len(done.log_probs)
      ('964', 'stop', 4, 4)
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    log_probs: list[float] = field(default_factory=list)
    proposed_drafts: int = 0
    accepted_drafts: int = 0
    parsed: Any = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Continuation:
    """Prompts that a session has read, and what it writes after them.

    Attributes:
      new_tokens: How many are written at most.
      streaming: Whether to look at the tokens while they come.
      grammar: Of every text, if it has one.
    """

    session: Session
    prompts: list[Prompt]
    writers: list[TextWriter]
    new_tokens: int
    streaming: bool
    grammar: Grammar | None = None

    def pieces(self) -> Iterator[tuple[int, str]]:
        """Row and new text, until all rows have ended."""
        return write(self.session, self.writers, self.new_tokens, self.streaming)

    def completions(self) -> list[Completion]:
        """What each row says; so far, if the pieces were not read to their end."""
        ended, session = self.session.done, self.session
        proposed, accepted = session.proposed, session.accepted
        return [
            Completion(
                text=writer.text,
                token_ids=session.chosen[i][: writer.count],
                prompt_token_ids=prompt.token_ids,
                finish_reason=(reason := self._reason(writer, ended[i])),
                log_probs=session.log_probs[i][: writer.count],
                proposed_drafts=proposed[i],
                accepted_drafts=accepted[i],
                parsed=self._parsed(writer) if reason == "stop" else None,
            )
            for i, (writer, prompt) in enumerate(zip(self.writers, self.prompts, strict=True))
        ]

    def _parsed(self, writer: TextWriter) -> Any:
        if self.grammar is None or self.grammar.parse is None or writer.stopped:
            return None
        return self.grammar.parse(writer.text)

    def _reason(self, writer: TextWriter, ended: bool) -> str:
        if ended:
            return "stop"
        return "length" if writer.count >= self.new_tokens else "unfinished"


def begin(
    model: Gemma,
    tokenizer: Tokenizer | None,
    prompts: Sequence,
    *,
    media: Mapping[str, Sequence[Sequence | None] | None],
    preparation: Mapping[str, object],
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] | None,
    sampling_fields: Mapping[str, float],
    seed: int | Sequence[int],
    stop: str | Sequence[str],
    stop_ids: int | Sequence[int] | None,
    chunk: int,
    progress: Progress | None,
    draft: Gemma | Slice | None,
    draft_tokens: int,
    logits_processors: LogitsProcessor | Sequence[LogitsProcessor],
    streaming: bool,
    grammar: Grammar | None = None,
) -> Continuation:
    """Reads prompts and chooses the first token after each; arguments as those of `generate`.

    Args:
      media: Name of a modality -> a list of items per prompt, or `None`.
      preparation: How items are prepared, see `modality_of`.
      streaming: See `Continuation`; stop texts are looked for in any case.
      grammar: What every text must look like.
    """
    check_model(model)
    if not prompts:
        raise ValueError("no prompt given; give at least one")
    stop = [stop] if isinstance(stop, str) else stop
    if stop and tokenizer is None:
        raise ValueError("stop texts need a tokenizer; give one, or stop_ids")
    if stop_ids is None:
        stop_ids = _default_stops(tokenizer, prompts)
    else:
        stop_ids = _given_stops(stop_ids, model.cfg.vocab_size)
    if tokenizer is not None:
        stop, special = split_stops(tokenizer, stop)
        stop_ids = (*stop_ids, *special)
    reader = PromptReader(tokenizer, modalities_of(model.cfg, **preparation))
    read = reader.all(prompts, media)
    longest, new = _lengths(model, read, max_new_tokens)
    session_class = Session
    if draft is not None:
        session_class = partial(SpeculativeSession, draft=draft, draft_tokens=draft_tokens)
    if grammar is not None:
        if draft is not None:
            raise ValueError("drafts do not follow a grammar; leave out draft, or the grammar")
        constraint = _constraint(model, tokenizer, grammar, stop_ids)
        each = [constraint, *(constraint.copy() for _ in read[1:])]
        session_class = partial(ConstrainedSession, constraints=each)
    session = session_class(
        model,
        len(read),
        longest + new,
        sampling=_resolve(sampling, sampling_fields),
        seeds=seed,
        stop_ids=stop_ids,
        chunk=chunk,
        logits_processors=logits_processors,
    )
    streaming = streaming or bool(stop)
    session.prefill(
        [p.token_ids for p in read],
        soft=[encode_prompt(model, p, reader.modalities) for p in read],
        max_new_tokens=new,
        run=not streaming,
        progress=progress,
    )
    writers = [TextWriter(tokenizer, stop, ids) for ids in session.stop_ids]
    return Continuation(session, read, writers, new, streaming, grammar)


def _constraint(
    model: Gemma, tokenizer: Tokenizer | None, grammar: Grammar, stop_ids: Sequence[int]
) -> GrammarConstraint:
    if tokenizer is None:
        raise ValueError(f"a {grammar.kind} needs a tokenizer; give one")
    return GrammarCompiler(tokenizer, model.cfg.vocab_size, stop_ids=stop_ids).of(grammar)


def check_model(model: object) -> None:
    """Refuses what is no model: the tokenizer, if both were given in the wrong order."""
    if not isinstance(model, Gemma):
        raise TypeError(f"expected a model and a tokenizer, got {type(model).__name__} first")


def check_names(function: Callable, sampling_fields: Mapping[str, float]) -> None:
    """Refuses a keyword that is neither an argument of a function nor a field of `Sampling`."""
    own = [name for name in signature(function).parameters if name != "sampling_fields"]
    known = [*own, *(field.name for field in fields(Sampling))]
    check_keywords(function.__name__, sampling_fields, known)


def _default_stops(tokenizer: Tokenizer | None, prompts: Sequence) -> tuple[int, ...]:
    if tokenizer is None:
        return ()
    messages = any(is_chat(prompt) or is_content(prompt) for prompt in prompts)
    return chat_stop_ids(tokenizer) if messages else tuple(tokenizer.stop_ids)


def _given_stops(stop_ids: int | Sequence[int], vocab_size: int) -> tuple[int, ...]:
    ids = (stop_ids,) if isinstance(stop_ids, Integral) else tuple(stop_ids)
    for i in ids:
        if not isinstance(i, Integral) or not 0 <= i < vocab_size:
            raise ValueError(f"stop_ids must be token ids in [0, {vocab_size}), got {i!r}")
    return ids


def _lengths(model: Gemma, prompts: list[Prompt], max_new_tokens: int) -> tuple[int, int]:
    """Tokens of the longest prompt, and how many new ones the context leaves room for."""
    if not isinstance(max_new_tokens, Integral):
        raise ValueError(f"{max_new_tokens=} must be an integer")
    longest = max(len(prompt.token_ids) for prompt in prompts)
    new = min(max_new_tokens, model.cfg.max_positions - longest)
    if max_new_tokens > 0 and new < 1:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room in the model's context of "
            f"{model.cfg.max_positions}; shorten it"
        )
    return longest, new


def _resolve(
    sampling: Sampling | Sequence[Sampling] | None, named: Mapping[str, float]
) -> Sampling | Sequence[Sampling]:
    if sampling is not None and named:
        raise ValueError(f"give sampling, or its fields {sorted(named)}, not both")
    return sampling or Sampling(**named)
