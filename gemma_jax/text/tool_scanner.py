"""Characters of a text that comes in pieces, for readers that wait where there are no more.

Readers are generators: `yield from scanner.peek()` gives the next character, and suspends the
whole chain of readers while there is none. So one reader serves whole texts and streams, and what
it finds cannot depend on where the text was cut.
"""

from __future__ import annotations

import re
from collections.abc import Generator

Waiting = Generator[None, None, str]  # what a reader of the scanner is: it returns a text
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
NAME_CHARACTER = re.compile(r"[A-Za-z0-9_.\-]+")
LONGEST_NAME = 128
SPACE = " \t\r\n"


class Malformed(Exception):
    """Says what was expected and where; `at` counts characters from the start of the text."""

    def __init__(self, message: str, at: int):
        super().__init__(message)
        self.at = at


class Scanner:
    """Holds what has come of a text and is still needed; places count from the text's start.

    Attributes:
      at: The place that is read next.
      floor: What lies in front of it is not needed any more.
      ended: Whether no more will come.
    """

    def __init__(self):
        self.at, self.floor, self.ended = 0, 0, False
        self._text, self._dropped = "", 0

    def push(self, text: str) -> None:
        """Takes a further piece."""
        self._text = self._text[self.floor - self._dropped :] + text
        self._dropped = self.floor

    def slice(self, start: int, stop: int) -> str:
        """The text between two places, the first not below `floor`."""
        return self._text[start - self._dropped : stop - self._dropped]

    @property
    def waiting(self) -> bool:
        """Whether all that has come is read."""
        return self.at - self._dropped >= len(self._text)

    def fail(self, message: str, at: int | None = None) -> None:
        """Raises `Malformed` at this place."""
        at = self.at if at is None else at
        place = at - self._dropped
        got = self._text[place : place + 1] if place >= 0 else ""
        ending = self.ended and place >= len(self._text)
        found = ", got the end of the text" if ending else f", got {got!r}" if got else ""
        raise Malformed(message + found, at)

    def peek(self) -> Waiting:
        """The next character, "" at the end."""
        while self.waiting:
            if self.ended:
                return ""
            yield
        return self._text[self.at - self._dropped]

    def take(self) -> Waiting:
        """The next character, which counts as read; "" at the end."""
        character = yield from self.peek()
        self.at += len(character)
        return character

    def run(self, pattern: re.Pattern) -> str:
        """As much as has come already and matches; never waits."""
        match = pattern.match(self._text, self.at - self._dropped)
        if match is None:
            return ""
        self.at += len(match[0])
        return match[0]

    def forget(self) -> None:
        """Nobody will go back behind this place."""
        self.floor = self.at

    def space(self) -> Waiting:
        """Reads over white space."""
        while (character := (yield from self.peek())) and character in SPACE:
            self.at += 1
        return ""

    def follows(self, text: str) -> Waiting:
        """Reads over `text` if it comes next, and says so ("" if not); waits no longer than needed
        to tell."""
        start = self.at
        for character in text:
            if (yield from self.peek()) != character:
                self.at = start
                return ""
            self.at += 1
        return text

    def expect(self, text: str) -> Waiting:
        """Reads over `text`.

        Raises:
          Malformed: At the first character that differs.
        """
        for character in text:
            if (yield from self.peek()) != character:
                self.fail(f"expected {text!r}")
            self.at += 1
        return text

    def many(self, pattern: re.Pattern, most: int, what: str) -> Waiting:
        """Characters as long as they match, one by one.

        Raises:
          Malformed: More than `most` of them.
        """
        start = self.at
        while (character := (yield from self.peek())) and pattern.match(character):
            self.at += 1
            if self.at - start > most:
                self.fail(f"expected {what} of at most {most} characters")
        return self.slice(start, self.at)
