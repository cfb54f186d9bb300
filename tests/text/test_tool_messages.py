"""Conversations with tools are written for Gemma 3 and for FunctionGemma."""

import json

import pytest

from gemma_jax.text.chat import render
from gemma_jax.text.tool_formats import FUNCTIONGEMMA, JSON, PYTHON
from gemma_jax.text.tool_messages import render_functiongemma, with_tools
from gemma_jax.text.tools import Tool

TOOL = Tool("now", "Tells the time.", {"type": "object", "properties": {}})


def call(number: int) -> dict:
    return {"id": f"c{number}", "type": "function", "function": {"name": "now", "arguments": "{}"}}


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Time?"},
    {"role": "assistant", "content": None, "tool_calls": [call(1), call(2)]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"hour": 12}'},
    {"role": "tool", "tool_call_id": "c2", "content": "noon"},
]


def test_for_gemma3():
    messages = with_tools(TALK, [TOOL], PYTHON)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"].startswith("Be brief.\n\nYou have access to functions.")
    assert messages[2]["content"] == "[now(), now()]"
    assert messages[3]["content"] == (
        '```tool_output\n{"name": "now", "result": {"hour": 12}}\n```\n'
        '```tool_output\n{"name": "now", "result": "noon"}\n```'
    )
    declared = JSON.declare([TOOL])
    assert json.loads(declared[declared.index("\n[\n") :])[0]["name"] == "now"
    assert render(messages).count("<start_of_turn>") == 4  # the template takes them


def test_for_functiongemma():
    start, end = "<start_function_call>call:now{}", "<end_function_call>"
    text = (
        "<bos><start_of_turn>developer\nBe brief.\nYou are a model that can do function calling "
        f"with the following functions{FUNCTIONGEMMA.declare([TOOL])}<end_of_turn>\n"
        "<start_of_turn>user\nTime?<end_of_turn>\n<start_of_turn>model\n"
        f"{2 * (start + end)}<start_function_response>response:now{{hour:12}}"
        "<end_function_response><start_function_response>response:now{result:<escape>noon<escape>}"
        "<end_function_response>"
    )
    assert render_functiongemma(TALK, [TOOL], FUNCTIONGEMMA) == text
    more = [{"role": "assistant", "content": "Noon."}, {"role": "user", "content": "Thanks"}]
    assert render_functiongemma([*TALK, *more], [TOOL], FUNCTIONGEMMA) == (
        f"{text}Noon.<end_of_turn>\n<start_of_turn>user\nThanks<end_of_turn>\n"
        "<start_of_turn>model\n"
    )


@pytest.mark.parametrize(
    ("messages", "line"),
    [
        ([{"role": "tool", "tool_call_id": "x", "content": ""}], "'x' is none of"),
        ([{"role": "assistant", "tool_calls": [{"id": "1"}]}], "expected tool_calls like"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}],
            "arguments of f to be an object",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(messages, line):
    with pytest.raises(ValueError, match=line):
        with_tools(messages, [], JSON)


def test_formats_with_turns_of_their_own():
    with pytest.raises(ValueError, match="render_functiongemma"):
        with_tools(TALK, [], FUNCTIONGEMMA)
    with pytest.raises(ValueError, match="right after the calls"):
        render_functiongemma([*TALK[:3], TALK[1]], [], FUNCTIONGEMMA)
