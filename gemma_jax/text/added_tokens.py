"""Tokens that are found in a text before any merge, with Hugging Face's flags.

Plain ones are pieces of the SentencePiece model, which finds them itself. Once a single token has a
flag that changes what is found, all of them are found here, by the rules of Hugging Face's
`tokenizers` (`tokenizers/src/tokenizer/added_vocabulary.rs` of 0.23, `find_matches`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_MARK = "\u2581"
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class AddedToken:
    """One token, as `added_tokens` of a tokenizer.json lists them.

    Attributes:
      content: Its text.
      special: Left out of decoded texts on request; taken for plain text on request.
      lstrip, rstrip: White space before and after belongs to it.
      single_word: Found between other characters than letters, digits and underscores alone.
      normalized: Found after spaces have become U+2581, and only in what the others left.
    """

    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False

    @classmethod
    def read(cls, entry: object) -> AddedToken:
        """From an entry of `added_tokens` or `added_tokens_decoder`.

        Raises:
          ValueError: no text in it, or a flag that is neither true nor false.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(f"expected an object per added token, got {entry!r:.80}")
        content = entry.get("content")
        if not isinstance(content, str) or not content:
            raise ValueError(f"expected added tokens with a content, got {entry!r:.200}")
        special = _flag(entry, "special", False)
        flags = {name: _flag(entry, name, False) for name in FLAGS[:3]}
        return cls(content, special, **flags, normalized=_flag(entry, "normalized", not special))

    @property
    def piece(self) -> str:
        """As the vocabulary spells it."""
        return self.content.replace(" ", _MARK)

    @property
    def plain(self) -> bool:
        """Whether the SentencePiece engine finds it among other plain ones, as `tokenizers` does.

        Those that are normalised come after those that are not, wherever they begin.
        """
        spaced = " " in self.content
        return not (self.lstrip or self.rstrip or self.single_word or self.normalized or spaced)


def _flag(entry: Mapping, name: str, default: bool) -> bool:
    value = entry.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"expected {name} to be true or false, got {entry!r:.200}")
    return value


class Finder:
    """Splits texts at tokens; of those that begin at one place the longest counts."""

    def __init__(self, tokens: Mapping[int, AddedToken]):
        raw = {t.content: (i, t) for i, t in tokens.items() if not t.normalized}
        marked = {t.piece: (i, t) for i, t in tokens.items() if t.normalized}
        self._passes = [(found, _pattern(found)) for found in (raw, marked)]

    def split(self, text: str, *, special: bool) -> Iterable[int | str]:
        """Ids of tokens, and the texts between them.

        Args:
          special: Whether special tokens count.
        """
        (raw, raw_pattern), (marked, marked_pattern) = self._passes
        for part in _split(text, raw, raw_pattern, special):
            if isinstance(part, int):
                yield part
            else:
                yield from _split(part.replace(" ", _MARK), marked, marked_pattern, special)


def _pattern(names: Iterable[str]) -> re.Pattern | None:
    longest_first = sorted(names, key=len, reverse=True)
    if not longest_first:
        return None
    first = "".join({re.escape(name[0]) for name in longest_first})  # most places fail at once
    return re.compile(f"(?=[{first}])(?:{'|'.join(map(re.escape, longest_first))})")


def _split(
    text: str,
    tokens: Mapping[str, tuple[int, AddedToken]],
    pattern: re.Pattern | None,
    special: bool,
) -> Iterable[int | str]:
    done = 0
    for match in pattern.finditer(text) if pattern else ():
        i, token = tokens[match[0]]
        start, end = match.span()
        if token.special and not special:
            continue
        if token.single_word and (re.search(r"\w\Z", text[:start]) or re.match(r"\w", text[end:])):
            continue
        if token.lstrip:
            start = max(len(text[:start].rstrip()), done)
        if token.rstrip:
            end = len(text) - len(text[end:].lstrip())
        if done < start:
            yield text[done:start]
        yield i
        done = end
    if done < len(text):
        yield text[done:]
