"""The loop around a model that calls tools: what it is told, and where it ends."""

import json
import re
from dataclasses import dataclass
from typing import Literal

import pytest

import gemma_jax as gj


@dataclass
class Place:
    city: str
    floor: int = 0


def visit(place: Place, days: int, mood: Literal["good", "bad"] = "good") -> dict:
    return {"seen": f"{type(place).__name__} {place.city}", "days": days, "mood": mood}


def fail() -> str:
    raise RuntimeError("the line\nis dead <end_of_turn>")


def loop(*answers: str, max_rounds: int = 4, **options):
    script = iter(answers)
    return gj.Tools([visit, fail], **options).loop(
        lambda messages: next(script), "Go", max_rounds=max_rounds
    )


def results(run) -> list:
    return [json.loads(m["content"]) for m in run.messages if m["role"] == "tool"]


CALL = '{"name": "visit", "parameters": {"place": {"city": "Rome"}, "days": 2.0}}'


def test_results_reach_the_model():
    events = []
    run = loop(CALL, "Done.", on_event=lambda kind, value: events.append(kind))
    assert results(run) == [{"seen": "Place Rome", "days": 2, "mood": "good"}]
    assert run.text == "Done." and run.finished
    assert events == ["answer", "call", "result", "answer"]
    call = run.messages[1]["tool_calls"][0]
    assert call["id"] == run.messages[2]["tool_call_id"] and call["function"]["name"] == "visit"


@pytest.mark.parametrize(
    ("call", "line"),
    [
        ("fail()", "the line is dead"),
        ("gone(a=1)", "there is no tool 'gone'"),
        ("visit(place={'city': 'Rome'})", r"expected \['days'\]"),
        ("visit(place={'city': 3}, days=1)", "place.city of visit to be of type string"),
        ("visit(place={'city': 'R'}, days=1, mood='odd')", "one of"),
        ("visit(place={'city': 'R'}, days=True)", "of type integer"),
        ("visit(place={'city': 'R'}, days=1, x=1)", "has no 'x'"),
    ],
)
def test_failures_go_to_the_model(call, line):
    run = loop(f"[{call}]", "Sorry.", format="python")
    (result,) = results(run)
    assert re.search(line, result["error"]) and "<" not in result["error"]
    assert run.finished


def test_a_call_that_cannot_be_read():
    run = loop('{"name": "visit", "parameters": {"days": }}', "Sorry.")
    assert "could not be read" in run.messages[2]["content"] and run.finished


def test_rounds_are_bound():
    run = loop(*3 * [CALL], max_rounds=3)
    assert not run.finished and len(results(run)) == 3
    with pytest.raises(ValueError, match="at least one round"):
        loop(max_rounds=0)


@pytest.mark.parametrize("format", ["json", "python"])
def test_with_a_model(format):
    model, tok = gj.load("checkpoints/digits")
    run = gj.Tools([visit], format=format).run(model, tok, "Hi", max_rounds=2, max_new_tokens=4)
    assert run.messages[0] == {"role": "user", "content": "Hi"} and isinstance(run.text, str)
    with pytest.raises(ValueError, match="needs the special tokens"):
        gj.Tools([visit], format="functiongemma").run(model, tok, "Hi")
