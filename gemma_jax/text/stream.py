"""Text out of a model one token at a time: whole characters only, and never past a stop text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from .tokenizer import UTF8_ERRORS, Tokenizer


class StreamDecoder:
    """`Tokenizer.decode` in parts: what `push` and `flush` return adds up to the text of all ids.

    A character may span several byte pieces; it is returned when it is whole. The cost of a push is
    that of its own ids, whatever came before.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = False):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(UTF8_ERRORS)

    def push(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete; an id without a piece adds none."""
        return self._utf8.decode(self._tokenizer.decode_bytes(ids, skip_special=self._skip_special))

    def flush(self) -> str:
        """One U+FFFD for each byte of a character that never came. A new text may follow."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class StopText:
    """Passes text on until one of `stops` appears in it, in whatever pieces the text arrives.

    The match that is complete first counts (of those that end together, the one that begins first);
    the text is cut where it begins. What could still become a match is held back.

    Attributes:
      matched: the stop text that was found, or None.
    """

    def __init__(self, stops: Sequence[str]):
        if isinstance(stops, str) or not all(isinstance(s, str) and s for s in stops):
            raise ValueError(f"expected a list of non-empty stop texts, got {stops!r}")
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What may be shown now; "" ever after a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        starts = {stop: start for stop in self._stops if (start := text.find(stop)) >= 0}
        if starts:
            self.matched = min(starts, key=lambda stop: (starts[stop] + len(stop), starts[stop]))
            self._held = ""
            return text[: starts[self.matched]]
        cut = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, `stop` itself excluded."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
