#!/usr/bin/env bash
# Expected: a grammar from the JSON schema {"type": "string"} accepts every spelling of a string that
# JSON has, at least what json.dumps writes.
# Seen with llguidance 1.9.1: control characters may be escaped, but a character that can stand for
# itself must: "\u00e9", as json.dumps writes an e with an acute by default, "\u003c" and "\/" are
# refused. Checking stored answers against such a grammar takes them for wrong; write them with
# ensure_ascii=False.
# Exits with 0 while that is so, and with 1 when it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "llguidance==1.9.1"
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import json
import sys

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper


class Bytes:
    """One token per byte, and one for the end."""

    bos_token_id = eos_token_id = 256
    special_token_ids = [256]
    tokens = [bytes([i]) for i in range(256)] + [b"\xff<eos>"]

    def __call__(self, text):
        return list(text)


print("llguidance", importlib.metadata.version("llguidance"))
tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string"}))


def accepted(text):
    assert isinstance(json.loads(text), str)
    matcher, ids = LLMatcher(tokenizer, grammar), list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


plain = [json.dumps("\u00e9", ensure_ascii=False), '"<"', '"/"', json.dumps("\n"), '"\\u000a"']
escaped = [json.dumps("\u00e9"), '"\\u003c"', '"\\/"']
for text in plain + escaped:
    print(text, "accepted" if accepted(text) else "refused")
sys.exit(0 if all(map(accepted, plain)) and not any(map(accepted, escaped)) else 1)
PYTHON
