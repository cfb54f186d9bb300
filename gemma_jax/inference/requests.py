"""What is asked of an engine, and what it answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from gemma_jax.inference.sampling import Sampling
from gemma_jax.multimodal.prompts import Prompt

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]


class Constraint(Protocol):
    """Says on the host which tokens may come next in one row; holds where the row is."""

    def mask(self) -> np.ndarray:
        """uint32 `[ceil(V / 32)]`: bit `i % 32` of word `i // 32` is set if token `i` is legal."""
        ...

    def accept(self, token_ids: Sequence[int]) -> None:
        """Moves on by tokens that were chosen. Raises `ValueError` for one that is not legal."""
        ...

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as there is no choice; often none."""
        ...

    def rewind(self, count: int) -> None:
        """Takes back the last `count` tokens accepted."""
        ...

    @property
    def complete(self) -> bool:
        """Whether nothing but a stop token is legal."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """Holds one text to be continued, and how.

    Attributes:
      prompt: Token ids, at least one, with the media that their placeholders stand for.
      max_new_tokens: Bound on the continuation, at least 1; with `prompt_log_probs` it may be 0.
      sampling: How to choose tokens.
      seed: The same prompt, seed and sampling give the same text, whatever runs beside it.
      stop_ids: Tokens that end the text.
      top_log_probs: How many of the most probable tokens to tell of at each place; 0: none.
      prompt_log_probs: Whether to tell of the tokens of the prompt too, which is then read whole,
        whatever is kept of earlier ones.
      logit_bias: Token id -> what is added to its logit.
      adapter: One of those that the model holds; `None`: the model alone.
      constraint: Which tokens are legal; `None`: all.
      owner: Whose request it is: owners take turns.
      deadline: By `time.monotonic()`; the text ends there with what it has. `None`: never.
      reuse: Whether the beginning may come from, and go to, what is kept of earlier prompts.

    Examples:
      >>> import gemma_jax as gj
      >>> warm = gj.Sampling(temperature=0.7)
      >>> gj.Request(prompt=gj.Prompt([2, 7]), max_new_tokens=9, sampling=warm).prompt.token_ids
      [2, 7]
    """

    prompt: Prompt
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    top_log_probs: int = 0
    prompt_log_probs: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    adapter: str | None = None
    constraint: Constraint | None = None
    owner: str = ""
    deadline: float | None = None
    reuse: bool = True


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Holds some tokens of an answer as they come; the last piece says why it ended.

    Attributes:
      token_ids: New ones, a stop token included.
      log_probs: Of each under the model, before any sampling rule, in nats.
      top_log_probs: Per token the most probable ones as `(id, log-probability)`, best first.
      prompt_log_probs, prompt_top_log_probs: The same of tokens of the prompt, in its order, where
        they were asked for; the first one has none. All of them come before new tokens.
      finish_reason: `None` until the last piece.
      error: What went wrong, with `finish_reason="error"`.
      refused: Whether what was asked for is to blame: its constraint could not go on.
    """

    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    top_log_probs: list[list[tuple[int, float]]] = field(default_factory=list)
    prompt_log_probs: list[float] = field(default_factory=list)
    prompt_top_log_probs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str = ""
    refused: bool = False


OnPiece = Callable[[Piece], None]


class Ticket(Protocol):
    """Stands for a request that an engine has taken.

    Attributes:
      prompt_tokens, cached_tokens: Tokens of the prompt, and how many of them were not read again
        (known from the first piece on).
    """

    prompt_tokens: int
    cached_tokens: int

    def cancel(self) -> None:
        """Ends the text; its slot is free at once. The last piece says `"cancelled"`."""
        ...


class Full(RuntimeError):
    """Says that an engine takes no more for now.

    Attributes:
      retry_after: Seconds after which to ask again.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after
