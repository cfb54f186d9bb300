"""What an engine knows of the requests that it has taken, and what it has counted."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from gemma_jax.inference.lookup import NextTokens, Patience
from gemma_jax.inference.prefill import PromptRow
from gemma_jax.inference.prefix_cache import Snapshot
from gemma_jax.inference.requests import OnPiece, Request

SAMPLES = 10_000  # of delays kept until somebody asks


class Work:
    """Holds a request that an engine has taken: its `Ticket`, and where it is."""

    def __init__(self, request: Request, on_piece: OnPiece, wake: Callable[[], None]):
        self.request, self.on_piece, self._wake = request, on_piece, wake
        self.prompt_tokens, self.cached_tokens = len(request.prompt.token_ids), 0
        self.cancelled = self.ended = False
        self.count = 0  # tokens chosen
        self.arrived = self.told = time.monotonic()
        self.row: PromptRow | None = None
        self.parts: list[slice] = []  # still to be read
        self.chain: list[Snapshot] = []  # of what was read
        self.next: Future[NextTokens] | None = None  # where there is a constraint
        self.patience = Patience()
        # Prompt and answer, as far as they go; a pass may bring some tokens more than asked for.
        self._text = np.full(self.tokens, -1, np.int32)
        self._text[: self.prompt_tokens] = request.prompt.token_ids

    @property
    def tokens(self) -> int:
        """Places in a cache that it may need."""
        return self.prompt_tokens + self.request.max_new_tokens

    @property
    def reuses(self) -> bool:
        """Whether its beginning may come from, and go to, what is kept.

        Not where log-probabilities are told of all its prompt: those of what is skipped would be
        missing, and what their program reads may differ in rounding from what others would.
        """
        return self.request.reuse and not self.request.prompt_log_probs

    @property
    def text(self) -> np.ndarray:
        """Ids of the prompt and of what was chosen; placeholders of media among them."""
        return self._text[: self.prompt_tokens + self.count]

    @property
    def left(self) -> int:
        """How many tokens it may still choose."""
        return self.request.max_new_tokens - self.count

    def chose(self, ids: list[int]) -> None:
        """Puts tokens behind its text, at most as many as are left."""
        at = self.prompt_tokens + self.count
        self._text[at : at + len(ids)] = ids
        self.count += len(ids)

    def until_end(self, ids: list[int]) -> tuple[list[int], bool]:
        """Those new tokens that belong to its text, and whether it ends with them.

        Kept drafts may be more than it may still choose, or stand behind its end. Its constraint is
        told of those that belong to it.
        """
        constraint, stop_ids = self.request.constraint, self.request.stop_ids
        for n, token in enumerate(ids[: self.left]):
            if token in stop_ids:
                return ids[: n + 1], True
            if constraint is not None:
                constraint.accept([token])
                if constraint.complete and not stop_ids:
                    return ids[: n + 1], True
        return ids[: self.left], False

    def cancel(self) -> None:
        """Ends the text; see `Ticket`."""
        self.cancelled = True
        self._wake()

    def late(self) -> bool:
        """Whether its deadline has passed."""
        return self.request.deadline is not None and time.monotonic() >= self.request.deadline


@dataclass
class Counters:
    """What an engine has done since it was made; delays are those since somebody asked last."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    kept_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    queue_seconds: deque = field(default_factory=lambda: deque(maxlen=SAMPLES))
    first_token_seconds: deque = field(default_factory=lambda: deque(maxlen=SAMPLES))
    inter_token_seconds: deque = field(default_factory=lambda: deque(maxlen=SAMPLES))
