"""Tools with the openai client as it is: declared, called, answered, whole and streamed."""

import json
from dataclasses import replace
from typing import Literal

import openai
import pydantic
import pytest
import tiny
import tiny_vocabulary
from serving_live import Scripted, live, saying

from gemma_jax.inference.constraints import GrammarCompiler
from gemma_jax.inference.engine import Engine
from gemma_jax.serving.limits import Limits
from gemma_jax.text.tool_calls import ToolCall
from gemma_jax.text.tool_formats import FUNCTIONGEMMA

USER = {"role": "user", "content": "the capital"}


class Weather(pydantic.BaseModel):
    """Tells the weather."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2]
    rain: bool


class Now(pydantic.BaseModel):
    """Tells the time."""


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Now)]
ARGUMENTS = {"city": "Paris", "days": 2, "rain": True}
PARIS = json.dumps({"name": "Weather", "parameters": ARGUMENTS})
NOW = '{"name": "Now", "parameters": {}}'


@pytest.fixture(scope="module")
def spoken(served_by):
    """A live server over `Scripted`, of a long context."""
    with live(served_by(Scripted(), context=4096)) as running:
        yield running


@pytest.fixture(scope="module")
def ask(spoken, tokenizer):
    def ask(text: str, method: str = "create", script=None, **fields):
        spoken.engine.script = script or saying(tokenizer, text, size=3)
        given = dict(model="tiny", messages=[USER], tools=TOOLS) | fields
        return getattr(spoken.client().chat.completions, method)(**given)

    return ask


def calls_of(message) -> list[tuple[str, dict]]:
    made = message.tool_calls or []
    return [(call.function.name, json.loads(call.function.arguments)) for call in made]


def prompt_of(live, tokenizer) -> str:
    return tokenizer.decode(live.engine.requests[-1].prompt.token_ids)


def test_a_call(ask, spoken, tokenizer):
    done = ask(PARIS)
    choice = done.choices[0]
    assert calls_of(choice.message) == [("Weather", ARGUMENTS)]
    assert choice.message.content is None and choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls[0].id.startswith("call_")
    assert done.usage.completion_tokens == len(tokenizer.encode(PARIS)) + 1
    assert '"description": "Tells the weather."' in prompt_of(spoken, tokenizer)


def test_text_and_several_calls(ask):
    done = ask(f"Wait.\n[{PARIS}, {NOW}]", n=2)
    for choice in done.choices:
        assert choice.message.content == "Wait."
        assert [name for name, _ in calls_of(choice.message)] == ["Weather", "Now"]
    ids = [call.id for choice in done.choices for call in choice.message.tool_calls]
    assert len(set(ids)) == 4


def test_a_stream_begins_a_call_with_its_name(ask):
    events = list(ask(PARIS, stream=True, stream_options={"include_usage": True}))
    deltas = [event.choices[0].delta for event in events if event.choices]
    made = [call for delta in deltas for call in delta.tool_calls or []]
    assert made[0].id and made[0].type == "function" and made[0].function.name == "Weather"
    assert made[0].function.arguments == "" and len(made) > 4
    assert all(call.index == 0 for call in made)
    assert all(call.id is None and call.function.name is None for call in made[1:])
    assert json.loads("".join(call.function.arguments for call in made)) == ARGUMENTS
    reasons = [event.choices[0].finish_reason for event in events if event.choices]
    assert [reason for reason in reasons if reason] == ["tool_calls"]
    assert events[-1].usage.completion_tokens > 0 and not events[-1].choices


def test_a_stream_adds_up_to_the_whole(ask):
    text = f"Wait.\n[{PARIS}, {NOW}]"
    whole = ask(text, n=2, logprobs=True)
    with ask(text, "stream", n=2, logprobs=True) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("tool_calls.function.arguments.done") == 4
    for one, other in zip(whole.choices, final.choices, strict=True):
        assert one.message.content == other.message.content
        assert calls_of(one.message) == calls_of(other.message)
        assert one.finish_reason == other.finish_reason
        assert [t.token for t in one.logprobs.content] == [t.token for t in other.logprobs.content]


def test_parse_makes_objects(ask):
    done = ask(PARIS, "parse")
    call = done.choices[0].message.tool_calls[0]
    assert call.function.parsed_arguments == Weather(**ARGUMENTS)


def test_one_call_alone(ask, spoken):
    for stream in (False, True):
        done = ask(f"[{PARIS}, {NOW}] and more", parallel_tool_calls=False, stream=stream)
        if stream:
            made = [c.choices[0].delta.tool_calls or [] for c in done]
            assert {call.index for calls in made for call in calls} == {0}
        else:
            assert calls_of(done.choices[0].message) == [("Weather", ARGUMENTS)]
            assert done.choices[0].finish_reason == "tool_calls"
        assert spoken.engine.tickets[-1].cancelled.is_set()


def test_none_is_text(ask, spoken, tokenizer):
    done = ask(PARIS, tool_choice="none")
    assert done.choices[0].message.content == PARIS and not done.choices[0].message.tool_calls
    assert "Weather" not in prompt_of(spoken, tokenizer)


def test_a_call_that_is_cut_off(ask, tokenizer):
    script = saying(tokenizer, PARIS[:-9], reason="length")
    done = ask("", script=script)
    assert done.choices[0].finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        ask("", "parse", script=script)


def test_a_conversation_goes_on(ask, spoken, tokenizer):
    first = ask(f"Wait.\n[{PARIS}, {NOW}]", "parse")
    made = first.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": text}
        for call, text in zip(made.tool_calls, ["rain", '{"hour": 12}'], strict=True)
    ]
    for message in (made, made.model_dump(), made.model_dump(exclude_none=True)):
        done = ask("It rains.", messages=[USER, message, *results])
        assert done.choices[0].message.content == "It rains."
        prompt = prompt_of(spoken, tokenizer)
        assert '{"name": "Weather", "result": "rain"}' in prompt
        assert '{"name": "Now", "result": {"hour": 12}}' in prompt
        assert "Wait." in prompt
    parts = [{"type": "text", "text": "ra"}, {"type": "text", "text": "in"}]
    results[0]["content"] = parts
    ask("It rains.", messages=[USER, made, *results], tools=openai.NOT_GIVEN)
    assert '"result": "rain"}' in prompt_of(spoken, tokenizer)


@pytest.mark.parametrize("specials", [(), FUNCTIONGEMMA.markers], ids=["pieces", "special"])
def test_calls_of_functiongemma(served_by, tmp_path, specials):
    tok = tiny_vocabulary.marked(tmp_path, FUNCTIONGEMMA.markers, specials)
    written = FUNCTIONGEMMA.write_calls([ToolCall("Weather", ARGUMENTS), ToolCall("Now")])
    engine = Scripted()
    engine.script = saying(tok, written + "<start_function_response>")
    simple = [t["function"] | {"parameters": {"properties": {}}} for t in TOOLS]
    tools = [{"type": "function", "function": function} for function in simple]
    cfg = tiny.gemma3(layers=1, vocab_size=tok.vocab_size)
    with live(served_by(engine, tokenizer=tok, cfg=cfg, context=4096)) as server:
        create = server.client().chat.completions.create
        done = create(model="tiny", messages=[USER], tools=tools)
        message = done.choices[0].message
        assert calls_of(message) == [("Weather", ARGUMENTS), ("Now", {})]
        assert message.content is None and done.choices[0].finish_reason == "tool_calls"
        assert tok.encode("<start_function_response>")[0] in engine.requests[-1].stop_ids
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "rain"}
            for call in message.tool_calls
        ]
        create(model="tiny", messages=[USER, message, *results], tools=tools)
        prompt = prompt_of(server, tok)
        assert prompt.count("<bos>") == 1 and written in prompt
        assert prompt.endswith("response:Now{result:<escape>rain<escape>}<end_function_response>")


def tool(**changes) -> dict:
    return {"type": "function", "function": {"name": "f", "parameters": {}} | changes}


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def after(*messages) -> dict:
    return dict(messages=[USER, *messages])


REFUSED = [
    (dict(tools=[{}]), "tools[0]"),
    (dict(tools=["f"]), "tools[0]"),
    (dict(tools=[{"type": "custom", "custom": {"name": "f"}}]), "tools[0]"),
    (dict(tools=[tool(name="a b")]), "tools[0]"),
    (dict(tools=[tool(parameters={"type": "array"})]), "tools[0]"),
    (dict(tools=[tool(parameters={"properties": {"x": {"not": {}}}})]), "tools[0]"),
    (dict(tools=[tool(deferred=True)]), "tools[0]"),
    (dict(tools=[tool(), tool()]), "tools"),
    (dict(tools=[tool(name=f"f{i}") for i in range(129)]), "tools"),
    (dict(tools=[tool(description="x" * 300_000)]), "tools"),
    (dict(tools=[tool()], tool_choice="always"), "tool_choice"),
    (dict(tools=[tool()], tool_choice={"type": "function", "function": {"name": "g"}}), "tool_ch"),
    (dict(tools=[], tool_choice="required"), "tool_choice"),
    (dict(tools=[tool()], parallel_tool_calls=1), "parallel_tool_calls"),
    (dict(tools=[tool()], response_format={"type": "json_object"}), "response_format"),
    (dict(functions=[{"name": "f"}]), "functions"),
    (after({"role": "tool", "content": "x"}), "messages[1].tool_call_id"),
    (after({"role": "tool", "content": "x", "tool_call_id": "c"}), "messages[1].tool_call_id"),
    (after({"role": "assistant"}), "messages[1].content"),
    (after({"role": "user", "content": "x", "tool_calls": [CALL]}), "messages[1].tool_calls"),
    (after({"role": "assistant", "tool_calls": [{}]}), "messages[1].tool_calls[0].id"),
    (after({"role": "assistant", "tool_calls": [CALL | {"x": 1}]}), "messages[1].tool_calls[0].x"),
    (
        after({"role": "assistant", "tool_calls": [CALL | {"function": {"name": "f"} | {
            "arguments": "[1]"}}]}),
        "messages[1].tool_calls[0].function.arguments",
    ),
]  # fmt: skip


@pytest.mark.parametrize("fields, param", REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_honoured_is_refused(ask, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask("Yes", **fields)
    body = caught.value.body
    assert body["param"].startswith(param) and body["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def caller(served_by, tokenizer):
    """A live server of a tiny random model that can be held to grammars."""
    cfg = tiny.gemma3(layers=1, window=2048, vocab_size=tokenizer.vocab_size)
    cfg = replace(cfg, max_positions=2048)
    engine = Engine(tiny.model(cfg, "unrolled"), slots=2, context=2048, chunk=512, queue=8)
    grammars = GrammarCompiler(tokenizer, cfg.vocab_size)
    engine.start()
    options = dict(cfg=cfg, structured=grammars.constraint, context=2048)
    with live(served_by(engine, limits=Limits(seconds=60), **options)) as running:
        yield running.client()
    engine.close()


def test_a_required_call_fits_its_schema(caller):
    fields = dict(model="tiny", messages=[USER], max_tokens=200)
    done = caller.chat.completions.parse(
        **fields, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, n=2, seed=3
    )
    for choice in done.choices:
        (call,) = choice.message.tool_calls
        assert isinstance(call.function.parsed_arguments, (Weather, Now))
        assert choice.message.content is None and choice.finish_reason == "tool_calls"


def test_a_named_call(caller):
    fields = dict(model="tiny", messages=[USER], max_tokens=300)
    named = {"type": "function", "function": {"name": "Weather"}}
    with caller.chat.completions.stream(**fields, tools=TOOLS, tool_choice=named, seed=1) as stream:
        final = stream.get_final_completion()
    made = final.choices[0].message.tool_calls
    assert made and all(isinstance(c.function.parsed_arguments, Weather) for c in made)


class Capital(pydantic.BaseModel):
    """An answer."""

    capital: Literal["Paris", "Rome"]


def test_an_answer_that_is_a_call_or_fits_its_schema(caller):
    """Of a random model: in eight answers there are some of either kind, and no others."""
    fields = dict(model="tiny", messages=[USER], max_tokens=200, n=8, seed=1, tools=TOOLS)
    done = caller.chat.completions.parse(
        **fields, response_format=Capital, parallel_tool_calls=False
    )
    kinds = set()
    for choice in done.choices:
        kinds.add(choice.finish_reason)
        if choice.finish_reason == "tool_calls":
            (call,) = choice.message.tool_calls
            assert isinstance(call.function.parsed_arguments, (Weather, Now))
            assert choice.message.content is None
        else:
            assert isinstance(choice.message.parsed, Capital) and not choice.message.tool_calls
    assert kinds == {"stop", "tool_calls"}
    fields |= dict(n=1, response_format=Capital)
    called = caller.chat.completions.parse(**fields, tool_choice="required").choices[0]
    assert called.finish_reason == "tool_calls" and called.message.content is None
    said = caller.chat.completions.parse(**fields, tool_choice="none").choices[0]
    assert isinstance(said.message.parsed, Capital)
    with pytest.raises(openai.BadRequestError, match="guided_regex and tools cannot both"):
        fields.pop("response_format")
        caller.chat.completions.create(**fields, extra_body={"guided_regex": "a+"})


def test_a_strict_tool_is_held_to_its_schema_where_it_is_called(served_by, tokenizer):
    engine, grammars = Scripted(), GrammarCompiler(tokenizer, tokenizer.vocab_size)
    engine.script = saying(tokenizer, PARIS)
    with live(served_by(engine, structured=grammars.constraint, context=4096)) as server:
        create = server.client().chat.completions.create
        create(model="tiny", messages=[USER], tools=TOOLS)
        constraint = engine.requests[-1].constraint
        constraint.accept(tokenizer.encode('Wait {"name": "Weather", "parameters": {"city": "'))
        with pytest.raises(ValueError, match="not legal"):
            constraint.accept(tokenizer.encode("B"))
        loose = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": False}}]
        create(model="tiny", messages=[USER], tools=loose)
        assert engine.requests[-1].constraint is None
