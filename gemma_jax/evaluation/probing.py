"""What a model finds in long texts, and whether its ring caches change anything."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import jax
import numpy as np

from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.cache import Cache
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.evaluation.continuations import score_continuations
from gemma_jax.evaluation.long_context import AT_A_DEPTH, TASKS, LongQuestion, long_question
from gemma_jax.inference.generate import generate
from gemma_jax.inference.prefill import bucket
from gemma_jax.placement import empty_cache
from gemma_jax.text import Tokenizer

LENGTHS, DEPTHS = (512, 1024, 2048), (0.0, 0.25, 0.5, 0.75, 1.0)
CHUNK = 512  # tokens that one pass reads into the caches
BESIDE = 16  # tokens that an answer may have beside those asked for


@dataclass(frozen=True)
class Found:
    """What a model made of one question.

    Attributes:
      length: Tokens that the question was made for.
      tokens: Of its prompt.
      accuracy: Share of the answers in `said`.
      log_prob, log_prob_without: Of the answer's tokens, the mean in nats: with what is asked for
        in the text, and without.
    """

    task: str
    length: int
    depth: float | None
    seed: int
    tokens: int
    answers: tuple[str, ...]
    said: str
    accuracy: float
    log_prob: float
    log_prob_without: float

    def row(self) -> dict:
        return asdict(self)


def probe(
    model: Gemma,
    tokenizer: Tokenizer,
    *,
    tasks: Sequence[str] = tuple(TASKS),
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Found]:
    """Asks a model about long texts that are made up; greedy, one text at a time.

    Args:
      tasks: Some of `long_context.TASKS`.
      lengths: In tokens, with prompt and answer.
      depths: 0 (the beginning) to 1, for the tasks with one place.
      samples: Texts of each task, length and depth.
      seed: Of the first; the others count on.
      progress: Told how many questions are done, and how many there are.

    Raises:
      ValueError: A length that the model's context does not hold, or that holds no question.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> probe(model, tok, tasks=["needle"], lengths=[1_000_000])
      Traceback (most recent call last):
        ...
      ValueError: length 1000000 is more than the model's context of 1024
    """
    for length in lengths:
        if length > model.cfg.max_positions:
            raise ValueError(
                f"length {length} is more than the model's context of {model.cfg.max_positions}"
            )
    if samples < 1:
        raise ValueError(f"{samples=} must be at least 1")

    encode = _encoder(tokenizer)
    asked = [
        (length, number, long_question(task, encode, length, depth=depth, seed=number))
        for length in lengths
        for task in tasks
        for depth in (depths if task in AT_A_DEPTH else (None,))
        for number in range(seed, seed + samples)
    ]
    found = []
    for done, (length, number, question) in enumerate(asked, 1):
        found.append(_ask(model, tokenizer, encode, question, length, number))
        if progress is not None:
            progress(done, len(asked))
    return found


def _encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """What turns texts into tokens, whatever markers they seem to have."""
    return partial(tokenizer.encode, bos=True, parse_special=False)


def _ask(
    model: Gemma,
    tokenizer: Tokenizer,
    encode: Callable[[str], list[int]],
    question: LongQuestion,
    length: int,
    seed: int,
) -> Found:
    prompt, without = encode(question.prompt), encode(question.without)
    answer = tokenizer.encode(question.answer, parse_special=False)
    room = max(1, min(len(answer) + BESIDE, model.cfg.max_positions - len(prompt)))
    (done,) = generate(model, tokenizer, [prompt], max_new_tokens=room)
    scores = score_continuations(model, [(prompt, answer), (without, answer)])
    said = tokenizer.decode(done.token_ids)
    with_it, without_it = (float(one.log_probs.mean()) for one in scores)
    return Found(
        question.task, length, question.depth, seed, len(prompt), question.answers, said,
        question.accuracy(said), with_it, without_it,
    )  # fmt: skip


def ring_errors(
    model: Gemma, tokenizer: Tokenizer, lengths: Sequence[int], *, seed: int = 0
) -> dict[int, float]:
    """`ring_error` at each length, of a text with a needle."""
    encode, found = _encoder(tokenizer), {}
    for length in lengths:
        question = long_question("needle", encode, length, depth=0.5, seed=seed)
        found[length] = ring_error(model, encode(question.prompt))
    return found


def ring_error(model: Gemma, ids: Sequence[int]) -> float:
    """How far a text read through the ring caches, chunk by chunk, differs from one pass over it.

    Args:
      ids: Of a text, as long as local layers are to forget its beginning.

    Returns:
      The largest difference of a log-probability of the next token, in nats.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> ring_error(model, tok.encode("Which digit is left?", bos=True)) < 1e-4
      True
    """
    ids = np.asarray(ids, np.int32)
    cache, logits = empty_cache(model, 1, bucket(len(ids))), None
    for first in range(0, len(ids), CHUNK):
        piece = ids[first : first + CHUNK]
        batch = Batch.padded([piece], min(bucket(len(piece)), CHUNK), starts=[first])
        cache, logits = _read(model, cache, batch)
    whole = _whole(model, Batch.padded([ids], bucket(len(ids))))
    return float(np.abs(np.asarray(logits) - np.asarray(whole)).max())


@partial(jax.jit, donate_argnames=("cache",))
def _read(model: Gemma, cache: Cache, batch: Batch) -> tuple[Cache, jax.Array]:
    out = forward(model, batch, cache=cache, logits="last")
    return out.cache, jax.nn.log_softmax(out.logits)


@jax.jit
def _whole(model: Gemma, batch: Batch) -> jax.Array:
    out = forward(model, batch, logits="last")
    return jax.nn.log_softmax(out.logits)
