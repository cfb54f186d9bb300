"""Clients of a server that speaks OpenAI's API: what they ask, and when answers reach them.

Every client is a connection of its own that reads a stream of `/v1/completions`. Prompts are token
ids, so that each server reads the same ones, and no end-of-text ends an answer early.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

PATIENCE = 600.0  # seconds for one answer


@dataclass(frozen=True)
class Ask:
    """Says what one client wants.

    Attributes:
      prompt: Token ids.
    """

    prompt: list[int]
    new_tokens: int


@dataclass
class Told:
    """What one client got, by `time.perf_counter()`.

    Attributes:
      arrivals: When each event with text came.
      prompt, cached, new: Tokens, as the server counts them.
      error: Why there is no whole answer.
    """

    sent: float = 0.0
    ended: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    prompt: int = 0
    cached: int = 0
    new: int = 0
    error: str = ""

    @property
    def first_token_s(self) -> float:
        """From the request to the first text."""
        return self.arrivals[0] - self.sent

    @property
    def delays_s(self) -> list[float]:
        """Between one event and the next; an event may hold several tokens."""
        return [b - a for a, b in itertools.pairwise(self.arrivals)]

    @property
    def token_s(self) -> float:
        """Mean time of a token behind the first event."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(self.new - 1, 1)


@dataclass(frozen=True)
class Mix:
    """Draws what clients ask: one beginning for all, then a stretch of text of each one's own.

    Attributes:
      text: Token ids to cut stretches from.
      shared: Tokens of the beginning, `bos` included.
      own, new: Fewest and most tokens.
    """

    text: Sequence[int]
    bos: int
    shared: int
    own: tuple[int, int]
    new: tuple[int, int]

    def asks(self, seed: int) -> Iterator[Ask]:
        """Without end; the same for the same seed."""
        rng, beginning = random.Random(seed), self.beginning(0)
        while True:
            own = self._stretch(rng, rng.randint(*self.own))
            yield Ask([*beginning, *own], rng.randint(*self.new))

    def pairs(self, count: int, seed: int) -> list[tuple[Ask, Ask]]:
        """Two prompts each with one beginning, which no others have; a few tokens to write."""
        rng, made = random.Random(seed), []
        for i in range(count):
            beginning = self.beginning(1 + seed * count + i)
            own = [self._stretch(rng, self.own[0]) for _ in range(2)]
            made.append(tuple(Ask([*beginning, *part], 8) for part in own))
        return made

    def beginning(self, which: int) -> list[int]:
        """Number 0 is that of `asks`."""
        return [self.bos, *self._stretch(random.Random(-1 - which), self.shared - 1)]

    def _stretch(self, rng: random.Random, length: int) -> list[int]:
        at = rng.randrange(len(self.text) - length)
        return list(self.text[at : at + length])


async def ask(port: int, one: Ask) -> Told:
    """Asks a server of this machine; what goes wrong is in `error`."""
    told = Told(sent=time.perf_counter())
    try:
        async with asyncio.timeout(PATIENCE):
            await _converse(port, one, told)
        if not told.new:
            told.error = "no token came"
    except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError) as error:
        told.error = f"{type(error).__name__}: {error}"
    told.ended = time.perf_counter()
    return told


async def _converse(port: int, one: Ask, told: Told) -> None:
    body = json.dumps(
        {
            "prompt": one.prompt,
            "max_tokens": one.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        if answer.split(b" ", 2)[1] != b"200":
            raise ValueError((answer + await reader.read(2000)).decode("utf-8", "replace"))
        await _read_events(reader, told)
    finally:
        writer.close()


async def _read_events(reader: asyncio.StreamReader, told: Told) -> None:
    """The events of a chunked body, which need not keep to its chunks."""
    kept = b""
    while size := int(await reader.readline(), 16):
        kept += (await reader.readexactly(size + 2))[:-2]
        *lines, kept = kept.split(b"\n")
        now = time.perf_counter()
        for line in lines:
            if line.startswith(b"data: {"):
                _note(json.loads(line[6:]), now, told)


def _note(event: dict, now: float, told: Told) -> None:
    if "error" in event:
        raise ValueError(str(event["error"])[:300])
    if any(choice.get("text") for choice in event.get("choices", ())):
        told.arrivals.append(now)
    if usage := event.get("usage"):
        told.prompt, told.new = usage["prompt_tokens"], usage["completion_tokens"]
        told.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


async def crowd(port: int, asks: Iterator[Ask], clients: int, seconds: float) -> list[Told]:
    """Many clients at once, each with the next question as soon as it has its answer.

    Args:
      asks: Shared by all.
      seconds: After which nobody asks anything new.
    """
    told, until = [], time.perf_counter() + seconds

    async def client() -> None:
        for one in asks:
            told.append(await ask(port, one))
            if time.perf_counter() > until:
                return

    await asyncio.gather(*(client() for _ in range(clients)))
    return told
