"""What an engine knows of the requests that it has taken, and what it has counted."""

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

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
        self.mask: Future | None = None

    @property
    def tokens(self) -> int:
        """Places in a cache that it may need."""
        return self.prompt_tokens + self.request.max_new_tokens

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
    finished: dict[str, int] = field(default_factory=dict)
    queue_seconds: deque = field(default_factory=lambda: deque(maxlen=SAMPLES))
    first_token_seconds: deque = field(default_factory=lambda: deque(maxlen=SAMPLES))
    inter_token_seconds: deque = field(default_factory=lambda: deque(maxlen=SAMPLES))
