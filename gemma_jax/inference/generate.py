"""Text in, text out."""

from collections.abc import Callable, Sequence

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.completion import Completion, Progress, begin, check_names
from gemma_jax.inference.grammar import Grammar, Schema
from gemma_jax.inference.logits_processors import LogitsProcessor
from gemma_jax.inference.sampling import Sampling
from gemma_jax.inference.session import CHUNK
from gemma_jax.inference.speculation import DRAFT_TOKENS
from gemma_jax.matformer import Slice
from gemma_jax.multimodal.prompts import Messages, Prompt, is_one_prompt
from gemma_jax.text import Tokenizer
from gemma_jax.vision.pan_and_scan import PanAndScan


def generate(
    model: Gemma,
    tokenizer: Tokenizer | None,
    prompt: str
    | Messages
    | Prompt
    | Sequence[int]
    | Sequence[str | Messages | Prompt | Sequence[int]],
    *,
    images: Sequence | None = None,
    audio: Sequence | None = None,
    pan_and_scan: PanAndScan | bool | None = None,
    pad_audio: bool = True,
    max_new_tokens: int = 128,
    sampling: Sampling | Sequence[Sampling] | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    stop_ids: int | Sequence[int] | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
    on_text: Callable[[int, str], None] | None = None,
    draft: Gemma | Slice | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    logits_processors: LogitsProcessor | Sequence[LogitsProcessor] = (),
    schema: Schema | None = None,
    regex: str | None = None,
    lark: str | None = None,
    **sampling_fields: float,
) -> Completion | list[Completion]:
    """Generates text after one prompt, or after each of a batch of prompts of any lengths.

    Args:
      prompt: One text (BOS is added once), chat messages (dicts with `role` and `content`, see
        `gemma_jax.text.chat`), what one message says as a list of texts and media
        (`[gj.Audio("a.wav"), "Transcribe this."]`), `Prompt`, or token ids, which are taken as they
        are and need no tokenizer; or a list of these.
      images: Images of one text, or one list of images per text of a batch: files, arrays, or
        whatever else `Image` takes. They go where the text says `<start_of_image>` (of Gemma 3n
        `<image_soft_token>`), or come first. Messages hold theirs in their content.
      audio: The same with sounds: what `Audio` takes, where the text says `<audio_soft_token>`.
        What is too long to be heard at once is read in pieces, with a warning.
      pan_and_scan: Adds crops of elongated pictures: True, False, or how. Default: as the
        checkpoint says, which for the published ones is not at all.
      pad_audio: Every clip takes as many tokens as the model was trained with; False is an
        experiment, and cheaper.
      max_new_tokens: Bound on the continuation; the context of the model may end before.
      sampling: How to choose tokens, one for all prompts or one per prompt; or its fields directly
        (`temperature=0.7, top_k=64`). Default: greedy.
      seed: One integer (modulo 2**32), or one per prompt. The same seed and prompt give the same
        text, also inside a larger batch: `[prompt] * 4` with `seed=range(4)` gives four texts.
      stop: Text or texts that end the continuation, of which they are no part. One may be a special
        token.
      stop_ids: Tokens that end it. Default: the tokenizer's, which are those that the checkpoint
        names (1 and 106 for Gemma 3).
      chunk: Longest stretch of prompt read in one pass.
      progress: Told how much of the prompt has been read.
      on_text: Called with row number and new text as it appears; whole characters only.
      draft: Speculates: this slice of the model (or another, smaller model) proposes tokens, and
        the model checks several at once. The text stays the model's; see
        `gemma_jax.inference.speculation`.
      draft_tokens: How many at once.
      logits_processors: Functions `(logits_BV, text_BS) -> logits_BV` of your own that change the
        logits before a token is chosen, by jnp, inside the compiled loop: after the repetition
        penalty, before all other rules. `text_BS` is int32, the token at each position of a row,
        prompt included, -1 behind the last. A function that is defined anew compiles anew, and what
        one reads besides its arguments is what it was at the first call; see
        `gemma_jax.inference.logits_processors`.
      schema: Every text is JSON that fits this schema: a dict, JSON, or a pydantic model, whose
        object is then `Completion.parsed`. `{"type": "object"}` is any JSON object. Objects are
        written as `json.dumps` does, with their properties in the order of the schema. Needs the
        extra `grammar`, as do `regex` and `lark`, of which one may be given instead. Text that
        `max_new_tokens` or `stop` cuts is only the beginning of one that fits.
      regex: Every text matches this regular expression as a whole (Rust's syntax, no look-around).
      lark: Every text is one of this grammar, in llguidance's variant of Lark.

    Returns:
      One `Completion`, or a list of them for a batch.

    Raises:
      ValueError: Empty prompt, ids outside the vocabulary, a prompt that leaves no room in the
        context, impossible sampling values, items that cannot be read or do not fit the text;
        a grammar that is not supported, costs too much (see `GrammarLimits`), or comes with
        `draft`; what pydantic's own validators say of a text.
      ImportError: A grammar without llguidance.
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
      >>> nine = tok.encode("9")[0]
      >>> def no_nine(logits_BV, text_BS):
      ...     return logits_BV.at[:, nine].set(float("-inf"))
      >>> print(gj.generate(model, tok, texts[0], images=[picture], logits_processors=no_nine))
      0
      >>> print(gj.generate(model, tok, "Which digits?", images=[picture], regex="[0-9]{2}"))
      46
    """
    check_names(generate, sampling_fields)
    single = is_one_prompt(prompt)
    written = begin(
        model,
        tokenizer,
        [prompt] if single else list(prompt),
        media={
            "image": [images] if single else images,
            "audio": [audio] if single else audio,
        },
        preparation={"pan_and_scan": pan_and_scan, "pad_audio": pad_audio},
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        sampling_fields=sampling_fields,
        seed=seed,
        stop=stop,
        stop_ids=stop_ids,
        chunk=chunk,
        progress=progress,
        draft=draft,
        draft_tokens=draft_tokens,
        logits_processors=logits_processors,
        streaming=on_text is not None,
        grammar=Grammar.of(schema=schema, regex=regex, lark=lark),
    )
    for row, text in written.pieces():
        if on_text is not None:
            on_text(row, text)
    completions = written.completions()
    return completions[0] if single else completions
