"""Text as it comes."""

from collections.abc import Iterator, Sequence

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.completion import Completion, Continuation, Progress, begin, check_names
from gemma_jax.inference.grammar import Grammar, Schema
from gemma_jax.inference.logits_processors import LogitsProcessor
from gemma_jax.inference.sampling import Sampling
from gemma_jax.inference.session import CHUNK
from gemma_jax.inference.speculation import DRAFT_TOKENS
from gemma_jax.matformer import Slice
from gemma_jax.multimodal.prompts import Messages, Prompt, is_one_prompt
from gemma_jax.text import Tokenizer
from gemma_jax.vision.pan_and_scan import PanAndScan


class TextStream(Iterator[str]):
    """Iterates over pieces of text as a model writes them; comes from `stream`.

    A piece is one or more whole characters. Nothing runs between two pieces, so leaving the loop
    ends the generation; the memory is free when nobody holds the stream any more.

    Attributes:
      completion: What was written so far, and all of it after the loop.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> three = "checkpoints/digits/three.png"
      >>> text = gj.stream(model, tok, "Read the digits.", images=[three])
      >>> next(text), text.completion.text, text.completion.finish_reason
      ('9', '9', 'unfinished')
      >>> "".join(text), text.completion.text, text.completion.finish_reason
      ('64', '964', 'stop')
    """

    def __init__(self, written: Continuation):
        self._written, self._pieces = written, written.pieces()

    def __next__(self) -> str:
        return next(self._pieces)[1]

    @property
    def completion(self) -> Completion:
        return self._written.completions()[0]


def stream(
    model: Gemma,
    tokenizer: Tokenizer,
    prompt: str | Messages | Prompt | Sequence[int],
    *,
    images: Sequence | None = None,
    audio: Sequence | None = None,
    pan_and_scan: PanAndScan | bool | None = None,
    pad_audio: bool = True,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stop_ids: int | Sequence[int] | None = None,
    chunk: int = CHUNK,
    progress: Progress | None = None,
    draft: Gemma | Slice | None = None,
    draft_tokens: int = DRAFT_TOKENS,
    logits_processors: LogitsProcessor | Sequence[LogitsProcessor] = (),
    schema: Schema | None = None,
    regex: str | None = None,
    lark: str | None = None,
    **sampling_fields: float,
) -> TextStream:
    """Generates text after one prompt and yields it piece by piece as it comes.

    Reads the prompt at once, and writes while it is iterated over. The text is that of `generate`,
    and so are the arguments; for several prompts at a time, `generate` has `on_text`.

    Args:
      prompt: One text, chat messages or `Prompt`, or a list of token ids.

    Returns:
      An iterator of texts, whose `completion` says the rest.

    Raises:
      ValueError: As `generate`, and for several prompts.
      TypeError: A keyword that there is not; the nearest one is named.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> picture = "checkpoints/digits/three.png"
      >>> for piece in gj.stream(model, tok, "Read the digits.", images=[picture]):
      ...     print(piece, end="", flush=True)
      964
    """
    check_names(stream, sampling_fields)
    if tokenizer is None:
        raise ValueError("a stream of text needs a tokenizer; generate works without one")
    if not is_one_prompt(prompt):
        raise ValueError("stream takes one prompt; for several, generate has on_text")
    return TextStream(
        begin(
            model,
            tokenizer,
            [prompt],
            media={"image": [images], "audio": [audio]},
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
            streaming=True,
            grammar=Grammar.of(schema=schema, regex=regex, lark=lark),
        )
    )
