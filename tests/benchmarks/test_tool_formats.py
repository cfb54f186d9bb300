"""The round trip of BFCL's calls, where its data are installed."""

import importlib.util
import json
from pathlib import Path

import pytest

from gemma_jax.benchmarks import tool_formats

RESULTS = Path(tool_formats.__file__).parent / "results" / "tool_formats.json"


def test_declarations_in_words_of_json_schema():
    pair = {"type": "tuple", "items": {"type": "float"}, "optional": True}
    whatever = {"type": "any", "description": "B"}
    said = {"type": "dict", "required": ["a"], "properties": {"a": pair, "b": whatever}}
    assert tool_formats._schema(said) == {
        "type": "object",
        "required": ["a"],
        "properties": {
            "a": {"type": "array", "items": {"type": "number"}},
            "b": {"description": "B"},
        },
    }


def test_a_call_that_does_not_come_back_is_seen():
    class Forgetful:
        write_calls = staticmethod(lambda calls: "[]")
        parse = staticmethod(tool_formats.FORMATS["json"].parse)
        parser = staticmethod(tool_formats.FORMATS["json"].parser)

    calls = [tool_formats.ToolCall("f", {"a": 1})]
    assert tool_formats.holds(tool_formats.FORMATS["json"], [], calls)
    assert not tool_formats.holds(Forgetful(), [], calls)


@pytest.mark.nightly
@pytest.mark.skipif(
    importlib.util.find_spec("bfcl_eval") is None,
    reason="bfcl-eval asks for a numpy that JAX does not take: pip install --no-deps bfcl-eval",
)
def test_stored_results_are_measured_again():
    assert tool_formats.measure() == json.loads(RESULTS.read_text("utf-8"))
