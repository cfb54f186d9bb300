"""The text of one answer as its tokens come, and which tokens each part of it is made of."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

from gemma_jax.inference.requests import Piece
from gemma_jax.text import StopText, StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Token:
    """One token of a text, and what else was probable there.

    Attributes:
      log_prob: `None` of the first token of a prompt, which follows nothing.
      top: `(id, log-probability)` of the most probable ones, best first.
      begin: Characters of the answer in front of it; below 0 in the prompt.
    """

    id: int
    log_prob: float | None
    top: Sequence[tuple[int, float]] = ()
    begin: int = 0


@dataclass(frozen=True)
class Part:
    """Some text of one answer.

    Attributes:
      index: Of the answer.
      tokens: Those whose text has been told of in full with this part.
      finish_reason: `"stop"`, `"length"`, or `None` while there is more to come.
      prompt: Tokens of the prompt, where their log-probabilities were asked for.
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None
    prompt: list[Token] = field(default_factory=list)


class PromptTrack:
    """Turns what pieces tell of a prompt into its tokens, the first one included.

    Args:
      token_ids: All of the prompt.
    """

    def __init__(self, tokenizer: Tokenizer, token_ids: Sequence[int]):
        self._decoder, self._ids = StreamDecoder(tokenizer), iter(token_ids)
        self._begin = -len(tokenizer.decode(token_ids))
        self._first = True

    def push(self, piece: Piece) -> list[Token]:
        """The next tokens."""
        told = list(zip(piece.prompt_log_probs, piece.prompt_top_log_probs, strict=True))
        if self._first:
            told, self._first = [(None, ()), *told], False
        return [self._next(log_prob, top) for log_prob, top in told]

    def _next(self, log_prob: float | None, top: Sequence[tuple[int, float]]) -> Token:
        token, begin = next(self._ids), self._begin
        self._begin += len(self._decoder.push([token]))
        return Token(token, log_prob, top, begin)


class TextTrack:
    """Turns pieces of one answer into parts: whole characters, no stop token, no stop text.

    Args:
      shown: Special tokens that are part of the text.
      with_end: Whether a stop token is among the tokens of the parts; it is never in the text.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        stops: Sequence[str],
        stop_ids: Sequence[int],
        shown: Sequence[str] = (),
        with_end: bool = False,
    ):
        self._with_end = with_end
        self.index, self.count = index, 0  # of tokens that were taken
        self._decoder = StreamDecoder(tokenizer)
        special = tokenizer.special_ids
        self._hidden = frozenset(special[name] for name in special.keys() - set(shown))
        self._guard, self._stop_ids = StopText(stops), frozenset(stop_ids)
        self._seen = self._shown = 0  # characters decoded, and passed on
        self._held: list[tuple[int, int, Token]] = []  # where the text of each begins and ends

    @property
    def stopped(self) -> bool:
        """Whether a stop text was met."""
        return self._guard.matched is not None

    def push(self, piece: Piece) -> Part:
        """What one piece adds."""
        text = []
        for i, token in enumerate(piece.token_ids):
            if self.stopped:
                break
            self.count += 1
            ends = token in self._stop_ids
            if ends and not self._with_end:
                continue
            told = piece.top_log_probs[i] if i < len(piece.top_log_probs) else ()
            log_prob = piece.log_probs[i] if i < len(piece.log_probs) else 0.0
            begin = self._seen
            new = "" if ends or token in self._hidden else self._decoder.push([token])
            self._seen += len(new)
            self._held.append((begin, self._seen, Token(token, log_prob, told, begin)))
            text.append(self._guard.push(new))
        return self._part("".join(text))

    def close(self, reason: str) -> Part:
        """What was held back, and why the answer ended."""
        rest = self._guard.push(self._decoder.flush())
        rest += self._guard.flush()
        self._shown += len(rest)
        if self.stopped:
            reason = "stop"
            self._held = [one for one in self._held if one[0] < self._shown]
        tokens, self._held = [token for _, _, token in self._held], []
        return Part(self.index, rest, tokens, reason)

    def _part(self, text: str) -> Part:
        self._shown += len(text)
        done = [one for one in self._held if one[1] <= self._shown]
        if not self.stopped:
            self._held = self._held[len(done) :]
            return Part(self.index, text, [token for _, _, token in done])
        done = [one for one in done if one[0] < self._shown or one[0] == one[1]]
        self._held = [one for one in self._held if one not in done]
        return Part(self.index, text, [token for _, _, token in done])


def spelled(tokenizer: Tokenizer, token: int) -> tuple[str, list[int]]:
    """The text of one token, and its bytes, which need not be whole characters."""
    data = tokenizer.decode_bytes([token])
    return codecs.decode(data, "utf-8", "replace"), list(data)
