"""Text of one row as its tokens come in."""

import time
from collections.abc import Iterator, Sequence

import jax

from gemma_jax.inference.session import Session
from gemma_jax.text import StopText, StreamDecoder, Tokenizer


def split_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[list[str], list[int]]:
    """Stop texts as those that text can hold, and ids of those that are special tokens.

    Raises:
      ValueError: A special token amid other text, where it would never be met.
    """
    texts = [stop for stop in stops if stop not in tokenizer.special_ids]
    for stop in texts:
        if inside := [name for name in tokenizer.special_ids if name in stop]:
            raise ValueError(
                f"the stop text {stop!r} holds the special token {inside[0]}, which no text shows; "
                f"give {inside[0]!r} alone"
            )
    return texts, [tokenizer.special_ids[stop] for stop in stops if stop not in texts]


class TextWriter:
    """Text of one row as its tokens come in: whole characters, no stop token, no stop text."""

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], stop_ids: tuple[int, ...]):
        self.text, self.count = "", 0  # and the number of tokens it came from
        self._decoder = StreamDecoder(tokenizer, skip_special=True) if tokenizer else None
        self._guard, self._stop_ids = StopText(stop), stop_ids

    @property
    def stopped(self) -> bool:
        return self._guard.matched is not None

    def extend(self, ids: list[int]) -> str:
        """New text, given all tokens of the row so far."""
        new = []
        for i in ids[self.count :]:
            if self.stopped:
                break
            self.count += 1
            if self._decoder is not None and i not in self._stop_ids:
                new.append(self._emit(self._decoder.push([i])))
        return "".join(new)

    def close(self) -> str:
        """What was held back, when no more tokens come."""
        if self._decoder is None:
            return ""
        text = self._emit(self._decoder.flush())
        rest = self._guard.flush()
        self.text += rest
        return text + rest

    def _emit(self, text: str) -> str:
        text = self._guard.push(text)
        self.text += text
        return text


def write(
    session: Session, writers: Sequence[TextWriter], limit: int, streaming: bool
) -> Iterator[tuple[int, str]]:
    """Row and new text of it as tokens come, until there are `limit` or all rows are done.

    Nothing runs between two pieces: who stops asking for them has stopped the model.
    """
    for chosen in steps(session, limit, streaming):
        for row, (writer, ids) in enumerate(zip(writers, chosen)):
            text = writer.extend(ids)
            if writer.stopped:
                session.stop(row)
            if text:
                yield row, text
    for row, writer in enumerate(writers):
        if text := writer.close():
            yield row, text


def steps(session: Session, limit: int, streaming: bool) -> Iterator[list[list[int]]]:
    """Tokens chosen so far, again and again until there are `limit` or all rows are done.

    Streaming asks for one token more at a time where a token is slow (CPU), and for as many as
    take about 50 ms where it is fast, so that the calls themselves never count.
    """
    step, burst = 1 if streaming else limit, 1
    while True:
        start = time.perf_counter()
        yield session.decode(step)
        if step >= limit or all(session.done):
            return
        if jax.process_count() > 1:
            burst = 8  # all processes must ask for the same
        else:
            pace = (time.perf_counter() - start) / burst
            burst = min(max(1, int(0.05 / max(pace, 1e-6))), 2 * burst, 32)
        step = min(step + burst, limit)
