"""Grammars of calls under constraints: markers are tokens where a grammar names them alone."""

from dataclasses import replace
from typing import Literal

import numpy as np
import pytest
import tiny
import tiny_vocabulary

import gemma_jax as gj
from gemma_jax.inference.constraints import NAMED, GrammarCompiler
from gemma_jax.text.tool_calls import ToolCall
from gemma_jax.text.tool_choice import call_grammar, call_or_answer_grammar, triggered_grammar
from gemma_jax.text.tool_formats import FUNCTIONGEMMA, JSON, PYTHON
from gemma_jax.text.tools import Tool

PLACE = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["deg C", "F", 3]},
    },
    "required": ["city"],
}
TOOLS = [Tool("weather", "", PLACE), Tool("now")]
CALLS = [ToolCall("weather", {"city": "Paris {x}", "days": 2, "unit": "deg C"}), ToolCall("now")]


@pytest.fixture(scope="module", params=[(), FUNCTIONGEMMA.markers], ids=["pieces", "special"])
def tokenizer(request, tmp_path_factory):
    """Of FunctionGemma's markers, which files call special tokens or not."""
    folder = tmp_path_factory.mktemp("marked")
    return tiny_vocabulary.marked(folder, FUNCTIONGEMMA.markers, request.param)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


def is_legal(constraint, token: int) -> bool:
    return bool(constraint.mask()[token // 32] >> np.uint32(token % 32) & 1)


@pytest.mark.parametrize("format", [JSON, PYTHON, FUNCTIONGEMMA], ids=lambda f: f.name)
def test_calls_as_they_are_written_are_legal(tokenizer, compiler, format):
    constraint = compiler.constraint("lark", call_grammar(TOOLS, "required", format))
    constraint.accept(tokenizer.encode(format.write_calls(CALLS)))
    assert constraint.may_end


@pytest.mark.parametrize("format", [JSON, FUNCTIONGEMMA], ids=lambda f: f.name)
def test_text_is_free_until_a_call(tokenizer, compiler, format):
    grammar, written = triggered_grammar(TOOLS, format), format.write_calls(CALLS)
    around = (written, f"Wait.\n{written}", f"{written} x")
    for text in ("", "the capital", 'x {"name": "Bob"}', *around):
        constraint = compiler.constraint("lark", grammar)
        constraint.accept(tokenizer.encode(text))
        assert constraint.may_end
    begun = written[: written.index("days")]
    constraint = compiler.constraint("lark", grammar)
    constraint.accept(tokenizer.encode(begun + "da"))
    assert not constraint.may_end
    with pytest.raises(ValueError, match="not legal"):
        constraint.accept(tokenizer.encode("z"))
    with pytest.raises(ValueError, match="format python"):
        triggered_grammar(TOOLS, PYTHON)


NAMED_ALIKE = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name"],
    "additionalProperties": False,
}
ONE = {"properties": {"a": {"enum": [1]}}, "required": ["a"]}
ONE_IN_PARTS = {
    "properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"enum": [1]}}, "required": ["a"],
}  # fmt: skip


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("format", [JSON, FUNCTIONGEMMA], ids=lambda f: f.name)
def test_an_answer_is_calls_or_fits_its_schema(tokenizer, compiler, format, parallel):
    """An answer may begin as a call does, and each schema has references of its own."""

    def ends(text):
        constraint = compiler.constraint("lark", grammar)
        constraint.accept(tokenizer.encode(text))
        return constraint.may_end

    # functiongemma knows no parts
    tools = [*TOOLS, Tool("f", "", ONE_IN_PARTS if format is JSON else ONE)]
    grammar = call_or_answer_grammar(tools, NAMED_ALIKE, format, parallel=parallel)
    single = ToolCall("f", {"a": 1})
    answers = ('{"name": "weatherman"}', '{"name": "f", "next": {"name": "x", "next": null}}')
    for text in (*answers, *(format.write_calls([one]) for one in (*CALLS, single))):
        assert ends(text)
    both = format.write_calls([*CALLS, single])
    if parallel:
        assert ends(both)
    else:
        with pytest.raises(ValueError, match="not legal"):
            ends(both)
    wrong = format.write_calls([ToolCall("f", {"a": 2})])
    for text in ("the capital", '{"name": 3}', '{"names": "x"}', wrong):
        with pytest.raises(ValueError, match="not legal"):
            ends(text)
    with pytest.raises(ValueError, match="format python"):
        call_or_answer_grammar(tools, NAMED_ALIKE, PYTHON)


def test_parameters_that_are_their_own_parts(compiler):
    tree = Tool("tree", "", {"properties": {"left": {"$ref": "#"}}})
    with pytest.raises(ValueError, match="the parameters of tree refer to '#'"):
        call_or_answer_grammar([tree], {"type": "null"}, JSON)


def test_markers_are_legal_where_they_are_named(tokenizer, compiler):
    start, end, escape = (tokenizer.encode(name)[0] for name in NAMED)
    constraint = compiler.constraint("lark", call_grammar(TOOLS, "required", FUNCTIONGEMMA))
    assert is_legal(constraint, start) and constraint.forced()[0] == start
    with pytest.raises(ValueError, match="not legal"):
        constraint.copy().accept([escape])
    text = "<start_function_call>call:weather{city:<escape>Pa"
    constraint.accept(tokenizer.encode(text))
    assert is_legal(constraint, escape) and not is_legal(constraint, start)
    with pytest.raises(ValueError, match="not legal"):  # nor spelled letter by letter
        constraint.accept(
            tokenizer.encode("<") + tokenizer.encode("escape") + tokenizer.encode(">")
        )
    constraint.accept([escape])
    assert not is_legal(constraint, end)


def test_other_grammars_know_no_marker(tokenizer, compiler):
    text = compiler.constraint("schema", '{"type": "string"}')
    text.accept(tokenizer.encode('"a'))
    free = compiler.constraint("regex", r"(.|\n)*")
    for name in FUNCTIONGEMMA.markers:
        for constraint in (text, free):
            assert not is_legal(constraint, tokenizer.encode(name)[0])


def visit(city: Literal["Paris", "Rome"], days: Literal[1, 2]) -> str:
    """Visits a city."""
    return f"{city} {days}"


@pytest.fixture(scope="module")
def model(tokenizer):
    cfg = tiny.gemma3(layers=1, window=2048, vocab_size=tokenizer.vocab_size)
    return tiny.model(replace(cfg, max_positions=2048), "unrolled")


def test_a_loop_that_must_begin_with_a_call(model, tokenizer):
    tools = gj.Tools([visit], format="functiongemma", choice="required")
    run = tools.run(model, tokenizer, "Go", max_rounds=1, max_new_tokens=150)
    calls = run.messages[1]["tool_calls"]
    assert calls and calls[0]["function"]["name"] == "visit"
    assert run.messages[2]["content"].split()[0] in ("Paris", "Rome")


def test_a_loop_without_tools(model, tokenizer):
    tools = gj.Tools([visit], choice="none")
    run = tools.loop(lambda messages: '{"name": "visit", "parameters": {}}', "Go")
    assert run.finished and "tool_calls" not in run.messages[1]
    with pytest.raises(ValueError, match="did you mean 'visit'"):
        gj.Tools([visit], choice={"type": "function", "name": "visits"})
