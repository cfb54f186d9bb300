"""Text in, text out: completions, streams, conversations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from inspect import signature

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.sampling import Sampling
from gemma_jax.inference.session import CHUNK, Session
from gemma_jax.inference.speculation import DRAFT_TOKENS, SpeculativeSession
from gemma_jax.inference.text_writer import TextWriter, split_stops, steps
from gemma_jax.matformer import Slice
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.prompts import Messages, Prompt, PromptReader, encode_prompt, is_chat
from gemma_jax.text import Tokenizer, chat_stop_ids
from gemma_jax.vision.pan_and_scan import PanAndScan

Progress = Callable[[int, int], None]  # tokens of prompt read so far, in total


@dataclass(frozen=True)
class Completion:
    """Holds what a model wrote after one prompt; `str()` of it is the text.

    Attributes:
      text: The continuation, without special tokens, cut before a stop text; empty if there was no
        tokenizer.
      token_ids: New tokens, a stop token included.
      prompt_token_ids: What the model was given.
      finish_reason: `"stop"` (stop token or stop text) or `"length"`.
      log_probs: Log-probability of each new token under the model, before sampling rules; nats.
      proposed_drafts, accepted_drafts: With a draft model, how many tokens it proposed, and how
        many of them were kept.

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

    def __str__(self) -> str:
        return self.text


def generate(
    model: Gemma,
    tokenizer: Tokenizer | None,
    prompt: str | Messages | Prompt | Sequence[str | Messages | Prompt | Sequence[int]],
    *,
    images: Sequence | None = None,
    pan_and_scan: PanAndScan | bool | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | Sequence[Sampling] | None = None,
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
    """Generates text after one prompt, or after each of a batch of prompts of any lengths.

    Args:
      prompt: One text (BOS is added once), chat messages (dicts with `role` and `content`, see
        `gemma_jax.text.chat`) or `Prompt`; or a list of these, or of lists of token ids, which are
        taken as they are and need no tokenizer.
      images: Images of one text, or one list of images per text of a batch: files, arrays, or
        whatever else `Image` takes. They go where the text says `<start_of_image>`, or come
        first. Messages hold theirs in their content.
      pan_and_scan: Adds crops of elongated pictures: True, False, or how. Default: as the
        checkpoint says, which for the published ones is not at all.
      max_new_tokens: Bound on the continuation; the context of the model may end before.
      sampling: How to choose tokens, one for all prompts or one per prompt; or its fields directly
        (`temperature=0.7, top_k=64`). Default: greedy.
      seed: One integer, or one per prompt. The same seed and prompt give the same text, also
        inside a larger batch.
      stop: Texts that end the continuation; they are not part of it. One may be a special token.
      stop_ids: Tokens that end it. Default: the tokenizer's, which are those that the checkpoint
        names (1 and 106 for Gemma 3).
      chunk: Longest stretch of prompt read in one pass.
      progress: Told how much of the prompt has been read.
      on_text: Called with row number and new text as it appears; whole characters only.
      draft: Speculates: this slice of the model (or another, smaller model) proposes tokens, and
        the model checks several at once. The text stays the model's; see
        `gemma_jax.inference.speculation`.
      draft_tokens: How many at once.

    Returns:
      One `Completion`, or a list of them for a batch.

    Raises:
      ValueError: Empty prompt, ids outside the vocabulary, a prompt that leaves no room in the
        context, impossible sampling values, items that cannot be read or do not fit the text.
      TypeError: A keyword that there is not; the nearest one is named.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> picture = "checkpoints/digits/three.png"
      >>> print(gj.generate(model, tok, "How many digits?", images=[picture]))
      3
      >>> texts = ["Which digit is left?", "Which digit is right?"]
      >>> [str(done) for done in gj.generate(model, tok, texts, images=2 * [[picture]])]
      ['9', '4']
    """
    _check_names(sampling_fields)
    single = isinstance(prompt, (str, Prompt)) or is_chat(prompt)
    given = [prompt] if single else list(prompt)
    if not given:
        raise ValueError("no prompt given; give at least one")
    if stop and tokenizer is None:
        raise ValueError("stop texts need a tokenizer; give one, or stop_ids")
    if stop_ids is None:
        stop_ids = _default_stops(tokenizer, given)
    if tokenizer is not None:
        stop, special = split_stops(tokenizer, stop)
        stop_ids = (*stop_ids, *special)
    reader = PromptReader(tokenizer, modalities_of(model.cfg, pan_and_scan=pan_and_scan))
    prompts = reader.all(given, {"image": [images] if single else images})
    longest, new = _lengths(model, prompts, max_new_tokens)
    session_class = Session
    if draft is not None:
        session_class = partial(SpeculativeSession, draft=draft, draft_tokens=draft_tokens)
    session = session_class(
        model,
        len(prompts),
        longest + new,
        sampling=_resolve(sampling, sampling_fields),
        seeds=seed,
        stop_ids=stop_ids,
        chunk=chunk,
    )
    streaming = on_text is not None or bool(stop)
    session.prefill(
        [p.token_ids for p in prompts],
        soft=[encode_prompt(model, p) for p in prompts],
        max_new_tokens=new,
        run=not streaming,
        progress=progress,
    )
    writers = [TextWriter(tokenizer, stop, ids) for ids in session.stop_ids]
    _write(session, writers, new, on_text, streaming)
    completions = _completions(session, writers, prompts)
    return completions[0] if single else completions


def _check_names(sampling_fields: Mapping[str, float]) -> None:
    """Refuses a keyword that is neither an argument of `generate` nor a field of `Sampling`."""
    own = [name for name in signature(generate).parameters if name != "sampling_fields"]
    known = [*own, *(field.name for field in fields(Sampling))]
    for name in sampling_fields:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it takes {', '.join(known)}"
            raise TypeError(f"generate has no argument {name!r}; {hint}")


def _default_stops(tokenizer: Tokenizer | None, prompts: Sequence) -> tuple[int, ...]:
    if tokenizer is None:
        return ()
    return chat_stop_ids(tokenizer) if any(map(is_chat, prompts)) else tuple(tokenizer.stop_ids)


def _lengths(model: Gemma, prompts: list[Prompt], max_new_tokens: int) -> tuple[int, int]:
    """Tokens of the longest prompt, and how many new ones the context leaves room for."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    new = min(max_new_tokens, model.cfg.max_positions - longest)
    if max_new_tokens > 0 and new < 1:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room in the model's context of "
            f"{model.cfg.max_positions}; shorten it"
        )
    return longest, new


def _write(
    session: Session,
    writers: list[TextWriter],
    new_tokens: int,
    on_text: Callable[[int, str], None] | None,
    streaming: bool,
) -> None:
    """Runs the session to its end and tells `on_text` what each row says."""
    for chosen in steps(session, new_tokens, streaming):
        for i, (writer, ids) in enumerate(zip(writers, chosen)):
            if (text := writer.extend(ids)) and on_text is not None:
                on_text(i, text)
            if writer.stopped:
                session.stop(i)
    for i, writer in enumerate(writers):
        if (text := writer.close()) and on_text is not None:
            on_text(i, text)


def _completions(
    session: Session, writers: list[TextWriter], prompts: list[Prompt]
) -> list[Completion]:
    ended, proposed, accepted = session.done, session.proposed, session.accepted
    return [
        Completion(
            text=writer.text,
            token_ids=session.chosen[i][: writer.count],
            prompt_token_ids=prompt.token_ids,
            finish_reason="stop" if ended[i] else "length",
            log_probs=session.log_probs[i][: writer.count],
            proposed_drafts=proposed[i],
            accepted_drafts=accepted[i],
        )
        for i, (writer, prompt) in enumerate(zip(writers, prompts, strict=True))
    ]


def _resolve(
    sampling: Sampling | Sequence[Sampling] | None, named: Mapping[str, float]
) -> Sampling | Sequence[Sampling]:
    if sampling is not None and named:
        raise ValueError(f"give sampling, or its fields {sorted(named)}, not both")
    return sampling or Sampling(**named)
