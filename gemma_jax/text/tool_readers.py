"""Readers of calls, one per syntax: they write each call's arguments as JSON text.

Each is a recursive descent over one scanner (`tool_scanner.py`). Nothing is ever evaluated. What
they find goes to a sink: `begin(name)` as soon as it is certain that a call has begun, pieces of
JSON text with `put`, `end()`. A reader that meets something else raises `Malformed`; before `begin`
this only means that the text is no call.
"""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from .tool_scanner import LONGEST_NAME, NAME_CHARACTER, Scanner, Waiting

MAX_DEPTH = 32
LONGEST_NUMBER = 400
LONGEST_KEY = 4096
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_PYTHON_NUMBER = re.compile(
    r"[+-]?(0[xX][0-9a-fA-F]+|(\d[\d_]*)?\.?\d[\d_]*\.?([eE][+-]?\d+)?)", re.ASCII
)
_NUMERAL = re.compile(r"[0-9A-Za-z_.+\-]")
_WORD = re.compile(r"[A-Za-z0-9_]")
_HEX = re.compile(r"[0-9a-fA-F]")
_JSON_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r"} | {
    "t": "\t"
}
_PYTHON_ESCAPES = {"'": "'", '"': '"', "\\": "\\", "\n": "", "a": "\a", "v": "\v", "0": "\0"} | {
    key: _JSON_ESCAPES[key] for key in "bfnrt"
}
Put = Callable[[str], None]
Steps = Generator[None, None, None]


class Sink(Protocol):
    """Takes what a reader finds."""

    fenced: bool

    def possible(self, name: str) -> bool:
        """Whether a call of a name that begins so may stand here."""
        ...

    def known(self, name: str) -> bool:
        """Whether there is such a tool."""
        ...

    def parameters(self, name: str) -> Sequence[str]:
        """Names of a tool's parameters in their order, as far as they are known."""
        ...

    def begin(self, name: str) -> None: ...

    def put(self, text: str) -> None: ...

    def end(self) -> None: ...


def inside_quotes(text: str) -> str:
    """The text as it stands in a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


class Reader(ABC):
    """What the three syntaxes have in common: lists, objects, numbers and words.

    Attributes:
      openings: Characters with which calls may begin.
      bare_calls: Whether one may also begin with its name.
      anywhere: Whether one may stand amid prose, whatever it names.
    """

    openings = ""
    bare_calls = anywhere = False
    words: Mapping[str, str] = MappingProxyType({w: w for w in ("true", "false", "null")})
    number, trailing_comma = _NUMBER, False
    lists: Mapping[str, str] = MappingProxyType({"[": "]"})

    def __init__(self, scanner: Scanner, sink: Sink):
        self.scanner, self.sink = scanner, sink

    @abstractmethod
    def read(self) -> Steps:
        """Reads one call, or a list of them."""

    @abstractmethod
    def starts_text(self, character: str) -> bool:
        """Whether a quoted text begins so."""

    @abstractmethod
    def text(self, put: Put) -> Steps:
        """Reads a quoted text."""

    @abstractmethod
    def key(self) -> Waiting:
        """Reads a key of an object and the sign behind it."""

    def value(self, depth: int) -> Steps:
        character = yield from self.scanner.peek()
        if depth > MAX_DEPTH:
            self.scanner.fail(f"expected values nested at most {MAX_DEPTH} deep")
        if character and self.starts_text(character):
            self.sink.put('"')
            yield from self.text(self.sink.put)
            self.sink.put('"')
        elif character == "{":
            yield from self.object(depth)
        elif character and character in self.lists:
            yield from self.list(depth)
        else:
            yield from self.numeral_or_word(character)

    def object(self, depth: int) -> Steps:
        self.scanner.at += 1
        self.sink.put("{")
        yield from self.pairs("}", depth)
        self.sink.put("}")

    def pairs(self, close: str, depth: int) -> Steps:
        keys: set[str] = set()

        def pair(_: int) -> Steps:
            start = self.scanner.at
            key = yield from self.key()
            self.new_key(keys, key, start)
            yield from self.scanner.space()
            yield from self.value(depth + 1)

        yield from self.entries(close, pair)

    def new_key(self, keys: set[str], key: str, start: int) -> None:
        if key in keys:
            self.scanner.fail(f"expected every name once, {key!r:.80} is there twice", start)
        keys.add(key)
        self.sink.put(f'"{inside_quotes(key)}": ')

    def list(self, depth: int) -> Steps:
        close = self.lists[(yield from self.scanner.take())]
        self.sink.put("[")
        count = yield from self.entries(close, lambda _: self.value(depth + 1))
        if close == ")" and count == 1:  # in Python `(1)` is no tuple
            self.scanner.fail("expected a tuple to have a comma", self.scanner.at - 1)
        self.sink.put("]")

    def entries(self, close: str, entry: Callable[[int], Steps], mark: bool = True):
        """Reads entries with commas between them up to `close`.

        Returns:
          Their number; 0 for one that has a comma behind it, so that `(1,)` is not `(1)`.
        """
        scanner, count = self.scanner, 0
        while True:
            yield from scanner.space()
            closes = (yield from scanner.peek()) == close
            if closes and (count == 0 or self.trailing_comma):
                scanner.at += 1
                return 0 if count == 1 else count
            if count and mark:
                self.sink.put(", ")
            yield from entry(count)
            count += 1
            yield from scanner.space()
            if (yield from scanner.follows(close)):
                return count
            if not (yield from scanner.follows(",")):
                scanner.fail(f"expected ',' or {close!r}")

    def numeral_or_word(self, character: str) -> Steps:
        start = self.scanner.at
        if character and character in "+-.0123456789":
            text = yield from self.scanner.many(_NUMERAL, LONGEST_NUMBER, "a number")
            self.sink.put(self.numeral(text, start))
        else:
            word = yield from self.scanner.many(_WORD, LONGEST_NAME, "a value")
            self.word(word, start)

    def word(self, word: str, start: int) -> None:
        if word not in self.words:
            self.scanner.fail("expected a value", start)
        self.sink.put(self.words[word])

    def numeral(self, text: str, start: int) -> str:
        if not self.number.fullmatch(text):
            self.scanner.fail(f"expected a number, not {text!r:.80}", start)
        if text.lower().lstrip("+-").startswith("0x"):
            return json.dumps(int(text, 16))
        if re.fullmatch(r"[+-]?[\d_]+", text):
            digits = text.replace("_", "")
            return json.dumps(int(digits))
        number = float(text.replace("_", ""))
        if not math.isfinite(number):
            self.scanner.fail(f"expected a number in the range of floats, not {text!r:.80}", start)
        return json.dumps(number)

    def name(self) -> Waiting:
        """Reads the name of a tool, no further than such a call may stand here."""
        scanner, start = self.scanner, self.scanner.at
        while (character := (yield from scanner.peek())) and NAME_CHARACTER.match(character):
            scanner.at += 1
            name = scanner.slice(start, scanner.at)
            if len(name) > LONGEST_NAME or name[0] in ".-" or not self.sink.possible(name):
                scanner.fail("expected the name of a tool", start)
        if scanner.at == start:
            scanner.fail("expected the name of a tool")
        return scanner.slice(start, scanner.at)

    def captured(self) -> Waiting:
        """A quoted text, as it is."""
        parts, start = [], self.scanner.at

        def put(part: str) -> None:
            parts.append(part)
            if self.scanner.at - start > LONGEST_KEY:
                self.scanner.fail(f"expected a name of at most {LONGEST_KEY} characters")

        yield from self.text(put)
        return json.loads(f'"{"".join(parts)}"', strict=False)

    def code_point(self, digits: int) -> Waiting:
        """The character of a hexadecimal escape; halves of pairs are joined, lone ones are lost."""
        code = yield from self._hex(digits)
        if 0xD800 <= code < 0xDC00 and (yield from self.scanner.follows("\\u")):
            low = yield from self._hex(4)
            if 0xDC00 <= low < 0xE000:
                return chr(0x10000 + ((code - 0xD800) << 10) + low - 0xDC00)
            return "\ufffd" + _character(low)
        return _character(code)

    def _hex(self, digits: int):
        start = self.scanner.at
        for _ in range(digits):
            if not _HEX.match((yield from self.scanner.peek())):
                self.scanner.fail(f"expected {digits} hexadecimal digits")
            self.scanner.at += 1
        return int(self.scanner.slice(start, self.scanner.at), 16)


def _character(code: int) -> str:
    return "\ufffd" if 0xD800 <= code < 0xE000 or code > 0x10FFFF else chr(code)


class JsonReader(Reader):
    """Reads `{"name": ..., "parameters": {...}}`, or a list of these."""

    openings = "{["
    _plain = re.compile(r'[^"\\]+')

    def read(self) -> Steps:
        if (yield from self.scanner.follows("[")):
            yield from self.scanner.space()
            yield from self.entries("]", lambda _: self._call(), mark=False)
        else:
            yield from self._call()

    def _call(self) -> Steps:
        scanner = self.scanner
        for part in ("{", '"name"', ":"):
            yield from scanner.expect(part)
            yield from scanner.space()
        yield from scanner.expect('"')
        name = yield from self.name()
        yield from scanner.expect('"')
        yield from scanner.space()
        if self.sink.known(name) and (yield from scanner.follows("}")):
            self.sink.begin(name)
            self.sink.put("{}")
            return self.sink.end()
        yield from scanner.expect(",")
        yield from scanner.space()
        yield from scanner.expect('"')
        word = "parameters" if (yield from scanner.peek()) == "p" else "arguments"
        yield from scanner.expect(f'{word}"')
        yield from scanner.space()
        yield from scanner.expect(":")
        yield from scanner.space()
        if (yield from scanner.peek()) != "{":
            scanner.fail("expected '{'")
        self.sink.begin(name)
        yield from self.object(1)
        yield from scanner.space()
        yield from scanner.expect("}")
        self.sink.end()

    def starts_text(self, character: str) -> bool:
        return character == '"'

    def text(self, put: Put) -> Steps:
        yield from self.scanner.expect('"')
        while True:
            if run := self.scanner.run(self._plain):
                put(inside_quotes(run))
            self.scanner.forget()
            character = yield from self.scanner.take()
            if character == '"':
                return
            if character == "\\":
                character = yield from self._escape()
            elif not character:
                self.scanner.fail("expected '\"' at the end of a text")
            put(inside_quotes(character))

    def _escape(self) -> Waiting:
        character = yield from self.scanner.take()
        if character == "u":
            return (yield from self.code_point(4))
        if character not in _JSON_ESCAPES:
            self.scanner.fail("expected an escape of JSON", self.scanner.at - len(character))
        return _JSON_ESCAPES[character]

    def key(self) -> Waiting:
        key = yield from self.captured()
        yield from self.scanner.space()
        yield from self.scanner.expect(":")
        return key


class PythonReader(Reader):
    """Reads `[f(a=1), g(b="x")]`; between fences, and of known tools, also `f(a=1)` alone."""

    openings, bare_calls = "[", True
    words = MappingProxyType({"True": "true", "False": "false", "None": "null", **Reader.words})
    number, trailing_comma = _PYTHON_NUMBER, True
    lists = MappingProxyType({"[": "]", "(": ")"})
    _plain = MappingProxyType({'"': re.compile(r'[^"\\]+'), "'": re.compile(r"[^'\\]+")})

    def read(self) -> Steps:
        if (yield from self.scanner.follows("[")):
            yield from self.scanner.space()
            yield from self.entries("]", lambda _: self._call(), mark=False)
        elif self._may_print() and (yield from self.scanner.follows("print(")):
            yield from self.scanner.space()
            yield from self._call()
            yield from self.scanner.space()
            yield from self.scanner.expect(")")
        else:
            yield from self._call(alone=True)

    def _may_print(self) -> bool:
        return self.sink.fenced and not self.sink.known("print")

    def _call(self, alone: bool = False) -> Steps:
        start = self.scanner.at
        name = yield from self.name()
        if alone and not self.sink.fenced and not self.sink.known(name):
            self.scanner.fail("expected the name of a tool", start)
        yield from self.scanner.expect("(")
        yield from self.scanner.space()
        begun, keys = [], set()

        def begin() -> None:
            if not begun:
                begun.append(name)
                self.sink.begin(name)
                self.sink.put("{")

        if (yield from self.scanner.peek()) == ")":
            begin()
        yield from self.entries(")", lambda i: self._argument(name, i, keys, begin), mark=False)
        self.sink.put("}")
        self.sink.end()

    def _argument(self, name: str, place: int, keys: set[str], begin: Callable[[], None]) -> Steps:
        scanner, start = self.scanner, self.scanner.at
        if (yield from scanner.follows("**")):
            yield from scanner.space()
            if (yield from scanner.peek()) != "{":
                scanner.fail("expected '{'")
            begin()
            scanner.at += 1
            yield from self._spread(keys)
            return
        word = ""
        if (character := (yield from scanner.peek())).isalpha() or character == "_":
            word = yield from scanner.many(NAME_CHARACTER, LONGEST_NAME, "a name")
            yield from scanner.space()
            if (yield from scanner.follows("=")):
                begin()
                self._separate(keys)
                self.new_key(keys, word, start)
                yield from scanner.space()
                yield from self.value(2)
                return
        names = self.sink.parameters(name)
        if (word and word not in self.words) or place >= len(names):
            scanner.fail(f"expected name=value in the call of {name}", start)
        begin()
        self._separate(keys)
        self.new_key(keys, names[place], start)
        yield from self.value(2) if not word else self._done(word, start)

    def _done(self, word: str, start: int) -> Steps:
        self.word(word, start)
        return
        yield

    def _separate(self, keys: set[str]) -> None:
        if keys:
            self.sink.put(", ")

    def _spread(self, keys: set[str]) -> Steps:
        """Reads the rest of `**{"a": 1}`: its entries are arguments."""

        def pair(_: int) -> Steps:
            start = self.scanner.at
            key = yield from self.key()
            self._separate(keys)
            self.new_key(keys, key, start)
            yield from self.scanner.space()
            yield from self.value(2)

        yield from self.entries("}", pair, mark=False)

    def starts_text(self, character: str) -> bool:
        return character in "\"'"

    def text(self, put: Put) -> Steps:
        quote = yield from self.scanner.peek()
        while quote and quote in "\"'":  # texts side by side are one
            yield from self._one_text(quote, put)
            yield from self.scanner.space()
            quote = yield from self.scanner.peek()

    def _one_text(self, quote: str, put: Put) -> Steps:
        scanner = self.scanner
        yield from scanner.expect(quote)
        triple = yield from scanner.follows(2 * quote)
        while True:
            if run := scanner.run(self._plain[quote]):
                put(inside_quotes(run))
            scanner.forget()
            character = yield from scanner.take()
            if character == quote and (not triple or (yield from scanner.follows(triple))):
                return
            if character == "\\":
                character = yield from self._escape()
            elif not character:
                scanner.fail(f"expected {quote} at the end of a text")
            put(inside_quotes(character))

    def _escape(self) -> Waiting:
        character = yield from self.scanner.take()
        if character and character in "xuU":
            return (yield from self.code_point({"x": 2, "u": 4, "U": 8}[character]))
        return _PYTHON_ESCAPES.get(character, "\\" + character)

    def key(self) -> Waiting:
        if not self.starts_text((yield from self.scanner.peek()) or " "):
            self.scanner.fail("expected a name in quotes")
        key = yield from self.captured()
        yield from self.scanner.space()
        yield from self.scanner.expect(":")
        return key
