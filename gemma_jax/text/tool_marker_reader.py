"""The reader of FunctionGemma's calls, whose signs are special tokens of its tokenizer."""

from __future__ import annotations

import re

from .tool_readers import Put, Reader, Steps, inside_quotes
from .tool_scanner import LONGEST_NAME, NAME_CHARACTER, Waiting

START_CALL, END_CALL, ESCAPE = "<start_function_call>", "<end_function_call>", "<escape>"


class MarkerReader(Reader):
    """Reads `<start_function_call>call:f{a:<escape>x<escape>}<end_function_call>`."""

    openings, anywhere = "<", True
    _plain = re.compile(r"[^<]+")

    def read(self) -> Steps:
        scanner = self.scanner
        yield from scanner.expect(f"{START_CALL}call:")
        name = yield from self.name()
        if (yield from scanner.peek()) != "{":
            scanner.fail("expected '{'")
        self.sink.begin(name)
        yield from self.object(1)
        yield from scanner.expect(END_CALL)
        self.sink.end()

    def starts_text(self, character: str) -> bool:
        return character == "<"

    def text(self, put: Put) -> Steps:
        scanner = self.scanner
        yield from scanner.expect(ESCAPE)
        while not (yield from scanner.follows(ESCAPE)):
            scanner.forget()
            if run := scanner.run(self._plain):
                put(inside_quotes(run))
            elif (character := (yield from scanner.take())) == "":
                scanner.fail(f"expected {ESCAPE} at the end of a text")
            else:
                put(inside_quotes(character))

    def key(self) -> Waiting:
        if (yield from self.scanner.peek()) == "<":
            key = yield from self.captured()
        else:
            key = yield from self.scanner.many(NAME_CHARACTER, LONGEST_NAME, "a name")
        if (yield from self.scanner.peek()) != ":":
            self.scanner.fail("expected a name and ':'")
        self.scanner.at += 1
        return key
