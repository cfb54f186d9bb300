"""Calls of tools, and how they are found in what a model writes: whole, or as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .tool_readers import Reader
from .tool_scanner import NAME_CHARACTER, SPACE, Malformed, Scanner

FENCES = ("tool_code", "tool_calls", "tool_call", "json", "python", "")
_FENCE = "```"


@dataclass(frozen=True)
class ToolCall:
    """Names a tool and what it is called with.

    Attributes:
      name: The tool.
      arguments: Names to values, as JSON has them.
      id: What a result refers to; "" where nobody has given one.
    """

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    id: str = ""


@dataclass(frozen=True)
class TextDelta:
    """Holds text that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallDelta:
    """Holds a part of a call.

    Attributes:
      index: Which call, from 0.
      name: The tool's, in the first part; "" in all others.
      arguments: More of the JSON text of its arguments.
      done: Whether the call is whole.
    """

    index: int
    name: str = ""
    arguments: str = ""
    done: bool = False


@dataclass(frozen=True)
class CallError:
    """Says that a call that had begun went wrong; what follows comes as text.

    Attributes:
      message: One line, with the place.
      index: Which call.
    """

    message: str
    index: int


Delta = TextDelta | CallDelta | CallError


@dataclass(frozen=True)
class Answer:
    """Holds what a model wrote, taken apart.

    Attributes:
      text: All that is no call; white space around calls does not count.
      calls: Those that are whole.
      errors: Lines on those that are not.
    """

    text: str
    calls: tuple[ToolCall, ...]
    errors: tuple[str, ...] = ()


def collect(deltas: Iterable[Delta]) -> Answer:
    """What the deltas of a whole text add up to."""
    texts: list[str] = []
    errors: list[str] = []
    names: dict[int, str] = {}
    arguments: dict[int, list[str]] = {}
    calls: list[ToolCall] = []
    for delta in deltas:
        if isinstance(delta, TextDelta):
            texts.append(delta.text)
        elif isinstance(delta, CallError):
            errors.append(delta.message)
        else:
            names.setdefault(delta.index, delta.name)
            arguments.setdefault(delta.index, []).append(delta.arguments)
            if delta.done:
                values = json.loads("".join(arguments[delta.index]))
                calls.append(ToolCall(names[delta.index], values))
    return Answer("".join(texts), tuple(calls), tuple(errors))


class CallParser:
    """Finds calls in a text that comes in pieces.

    What `feed` and `close` return adds up to the same, however the text was cut. Only what can
    still become the opening of a call is held back. A call begins a line or a fence
    (```` ```json ````), follows another call, or names one of `tools`; FunctionGemma's may stand
    anywhere.

    Args:
      reader: The syntax; `ToolFormat.parser` gives it.
      tools: Names of the tools, each with the names of its parameters in their order.
    """

    def __init__(self, reader: type[Reader], tools: Mapping[str, Sequence[str]] | None = None):
        self._scanner, self._tools = Scanner(), dict(tools or {})
        self._reader = reader(self._scanner, self)
        self._alone = reader.bare_calls
        self._deltas: list[Delta] = []
        self._count, self._begun = 0, False
        self._new_line, self._after_call, self._previous = True, False, ""
        self.fenced = False
        self._steps = self._answer()

    def feed(self, text: str) -> list[Delta]:
        """What a further piece of text settles."""
        self._scanner.push(text)
        return self._advance()

    def close(self) -> list[Delta]:
        """What the end of the text settles."""
        self._scanner.ended = True
        return self._advance()

    def _advance(self) -> list[Delta]:
        next(self._steps, None)
        found, self._deltas = self._deltas, []
        return _joined(found)

    # What the reader tells and asks.

    def possible(self, name: str) -> bool:
        """Whether a call of a name that begins so may stand here."""
        return self._free() or any(tool.startswith(name) for tool in self._tools)

    def _free(self) -> bool:
        """Whether a call of any name may stand here."""
        follows = self._begun or self._after_call
        return self._new_line or self.fenced or follows or self._reader.anywhere

    def known(self, name: str) -> bool:
        """Whether there is such a tool."""
        return name in self._tools

    def parameters(self, name: str) -> Sequence[str]:
        """A tool's parameters in their order."""
        return self._tools.get(name, ())

    def begin(self, name: str) -> None:
        """A call has begun for certain."""
        if not (self._free() or name in self._tools):
            self._scanner.fail("expected the name of a tool")
        self._begun = True
        self._deltas.append(CallDelta(self._count, name))

    def put(self, text: str) -> None:
        """More of its arguments."""
        self._deltas.append(CallDelta(self._count, "", text))

    def end(self) -> None:
        """The call is whole."""
        self._deltas.append(CallDelta(self._count, done=True))
        self._count += 1

    # The text around the calls.

    def _answer(self):
        scanner = self._scanner
        while True:
            scanner.forget()
            if not (yield from scanner.peek()):
                return
            start, state = scanner.at, (self.fenced, self._new_line)
            previous = self._previous
            try:
                yield from self._opening()
                continue
            except Malformed as error:
                if not self._begun:
                    self._previous = previous
                    yield from self._release(start, *state)
                    continue
                self._deltas.append(CallError(f"character {error.at}: {error}", self._count))
            yield from self._rest()
            return

    def _opening(self):
        """Reads white space, perhaps a fence, and calls; or the end of a fence.

        Raises:
          Malformed: There is none; `_begun` says whether there was the beginning of one.
        """
        scanner, self._begun = self._scanner, False
        yield from self._space()
        if self._after_call and (yield from scanner.peek()) in (",", ";"):
            scanner.at += 1
            yield from self._space()
        if (yield from scanner.peek()) == "`":
            yield from scanner.expect(_FENCE)
            if self.fenced:
                self.fenced, self._new_line = False, True
                return
            yield from self._tag()
            self.fenced = True
            yield from self._space()
        if not self._may_begin((yield from scanner.peek())):
            scanner.fail("expected a call")
        yield from self._reader.read()
        self._after_call, self._new_line, self._previous = True, False, ")"

    def _may_begin(self, character: str) -> bool:
        if character and character in self._reader.openings:
            return True
        inside = NAME_CHARACTER.match(self._previous)
        return self._alone and not inside and bool(NAME_CHARACTER.match(character))

    def _space(self):
        scanner = self._scanner
        while (character := (yield from scanner.peek())) and character in SPACE:
            self._new_line |= character == "\n"
            self._previous = character
            scanner.at += 1

    def _tag(self):
        """Reads what a fence says of its content."""
        tag = yield from self._scanner.many(NAME_CHARACTER, 16, "the name of a language")
        if tag not in FENCES:
            self._scanner.fail(f"expected one of {FENCES}")

    def _release(self, start: int, fenced: bool, new_line: bool):
        """Passes on white space and the character behind it, where no call begins."""
        scanner = self._scanner
        scanner.at, self.fenced, self._new_line = start, fenced, new_line
        yield from self._space()
        space = scanner.slice(start, scanner.at)
        character = yield from scanner.take()
        if character:
            self._new_line, self._previous = False, character
        text = space + character
        self._text(text.lstrip() if self._after_call else text)
        self._after_call &= not character

    def _rest(self):
        """Passes on what follows an error."""
        scanner = self._scanner
        while character := (yield from scanner.take()):
            scanner.forget()
            self._text(character)

    def _text(self, text: str) -> None:
        if text:
            self._deltas.append(TextDelta(text))


def _joined(deltas: list[Delta]) -> list[Delta]:
    """The same in as few parts as possible."""
    joined: list[Delta] = []
    for delta in deltas:
        last = joined[-1] if joined else None
        if isinstance(delta, TextDelta) and isinstance(last, TextDelta):
            joined[-1] = TextDelta(last.text + delta.text)
        elif (
            isinstance(delta, CallDelta)
            and isinstance(last, CallDelta)
            and (delta.index == last.index)
        ):
            arguments = last.arguments + delta.arguments
            joined[-1] = CallDelta(last.index, last.name, arguments, delta.done)
        else:
            joined.append(delta)
    return joined
