"""How much one request may ask for, and how many a client may send."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from gemma_jax.serving.errors import too_many


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bounds on one request.

    Attributes:
      body_bytes: Of the whole request, media included.
      body_seconds: In which it has to arrive.
      depth: How far JSON may be nested.
      pixels, media_items: Of one picture; pictures and clips together.
      audio_seconds: Of one clip.
      new_tokens: Of one answer; 0: what the context leaves.
      choices: Answers of one request.
      messages, stops, tools: How many.
      stop_characters, schema_bytes: Of each.
      tools_bytes: Of all tools together, as JSON.
      log_probs: Most probable tokens at one place.
      seconds: After which an answer ends with what it has.
      write_seconds: In which a client has to take what is written to it.
      media_seconds: In which a picture of an allowed domain has to arrive.

    Examples:
      >>> Limits(body_bytes=1 << 20).choices
      8
    """

    body_bytes: int = 32 << 20
    body_seconds: float = 30.0
    depth: int = 64
    pixels: int = 16_000_000
    media_items: int = 16
    audio_seconds: float = 1800.0
    new_tokens: int = 0
    choices: int = 8
    messages: int = 1024
    stops: int = 16
    stop_characters: int = 256
    tools: int = 128
    schema_bytes: int = 64 << 10
    tools_bytes: int = 256 << 10
    log_probs: int = 20
    seconds: float = 600.0
    write_seconds: float = 60.0
    media_seconds: float = 10.0


class RateLimit:
    """Lets each client send so many requests a minute, and as many at once.

    Attributes:
      per_minute: 0 for no bound.
    """

    REMEMBERED = 10_000  # clients; who was not seen for longest begins anew

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic):
        self.per_minute, self._clock = per_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, client: str) -> None:
        """Counts one request.

        Raises:
          ApiError: 429, with the seconds until the next one is welcome.
        """
        if not self.per_minute:
            return
        now, pace = self._clock(), self.per_minute / 60
        left, seen = self._left.pop(client, (self.per_minute, now))
        left = min(self.per_minute, left + (now - seen) * pace)
        fine = left >= 1
        self._left[client] = (left - 1 if fine else left, now)
        while len(self._left) > self.REMEMBERED:
            self._left.popitem(last=False)
        if not fine:
            raise too_many(
                f"more than {self.per_minute:g} requests a minute",
                (1 - left) / pace,
                "rate_limit_exceeded",
            )
