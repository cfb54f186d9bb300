"""`client.responses` of the openai client as it is."""

import json
from typing import Literal

import openai
import pydantic
import pytest
from serving_live import Scripted, live, saying


class Weather(pydantic.BaseModel):
    """Tells the weather."""

    city: Literal["Paris", "Rome"]
    rain: bool


TOOLS = [openai.pydantic_function_tool(Weather)]
FLAT = [{"type": "function", **TOOLS[0]["function"]}]
ARGUMENTS = {"city": "Paris", "rain": True}
CALL = json.dumps({"name": "Weather", "parameters": ARGUMENTS})


@pytest.fixture(scope="module")
def spoken(served_by):
    with live(served_by(Scripted(), context=4096)) as running:
        yield running


@pytest.fixture(scope="module")
def ask(spoken, tokenizer):
    def ask(answer: str, method: str = "create", script=None, **fields):
        spoken.engine.script = script or saying(tokenizer, answer, size=3)
        return getattr(spoken.client().responses, method)(
            **(dict(model="tiny", input="the capital") | fields)
        )

    return ask


def prompt_of(live, tokenizer) -> str:
    return tokenizer.decode(live.engine.requests[-1].prompt.token_ids)


def test_a_text(ask, spoken, tokenizer):
    done = ask("It is Paris.", instructions="Be brief.", max_output_tokens=50, temperature=0.5)
    assert done.output_text == "It is Paris." and done.status == "completed"
    assert done.usage.output_tokens == len(tokenizer.encode("It is Paris.")) + 1
    assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens
    assert (done.instructions, done.temperature, done.store) == ("Be brief.", 0.5, False)
    request = spoken.engine.requests[-1]
    assert request.max_new_tokens == 50 and request.sampling.temperature == 0.5
    assert "Be brief.\n\nthe capital" in prompt_of(spoken, tokenizer)


def test_an_answer_that_is_cut_off(ask, tokenizer):
    done = ask("", script=saying(tokenizer, "It is", reason="length"))
    assert done.status == "incomplete" and done.output_text == "It is"
    assert done.incomplete_details.reason == "max_output_tokens"
    assert done.output[0].status == "incomplete"


def test_a_stream_adds_up(ask):
    events = list(ask(f"Wait.\n{CALL}", tools=FLAT, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type.removeprefix("response.") for e in events]
    in_order = list(dict.fromkeys(kinds))
    assert in_order == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "function_call_arguments.delta", "function_call_arguments.done", "completed",
    ]  # fmt: skip
    text, call = events[-1].response.output
    pieces = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(pieces) == text.content[0].text == "Wait."
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments and json.loads(call.arguments) == ARGUMENTS
    added = [e for e in events if e.type == "response.output_item.added"]
    assert [e.output_index for e in added] == [0, 1] and added[1].item.arguments == ""
    assert added[1].item.id == call.id and added[0].item.status == "in_progress"


def test_the_helper_of_streams(ask):
    with ask(CALL, "stream", tools=TOOLS) as stream:
        kinds = {event.type for event in stream}
        done = stream.get_final_response()
    assert "response.function_call_arguments.delta" in kinds
    assert done.output[0].parsed_arguments == Weather(**ARGUMENTS)
    with ask("It is Paris.", "stream") as stream:
        assert stream.get_final_response().output_text == "It is Paris."


def test_a_conversation_goes_on(ask, spoken, tokenizer):
    first = ask(f"Wait.\n{CALL}", "parse", tools=TOOLS)
    call = first.output[1]
    assert call.parsed_arguments == Weather(**ARGUMENTS)
    said = {"role": "user", "content": [{"type": "input_text", "text": "the capital"}]}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    for kept in (first.output, [item.model_dump(exclude_none=True) for item in first.output]):
        done = ask("It rains.", input=[said, *kept, result], tools=FLAT)
        assert done.output_text == "It rains."
        prompt = prompt_of(spoken, tokenizer)
        assert f"Wait.\n{CALL}" in prompt
        assert '{"name": "Weather", "result": "rain"}' in prompt


REFUSED = [
    (dict(previous_response_id="resp_1"), "previous_response_id"),
    (dict(store=True), "store"),
    (dict(background=True), "background"),
    (dict(conversation="conv_1"), "conversation"),
    (dict(include=["reasoning.encrypted_content"]), "include"),
    (dict(truncation="auto"), "truncation"),
    (dict(reasoning={"effort": "high"}), "reasoning"),
    (dict(tools=[{"type": "web_search"}]), "tools[0]"),
    (dict(tool_choice="required"), "tool_choice"),
    (dict(input=[]), "input"),
    (dict(input=[{"type": "item_reference", "id": "x"}]), "input[0].type"),
    (dict(input=[{"role": "user", "content": "x", "name": "Ann"}]), "input[0].name"),
    (
        dict(input=[{"type": "function_call_output", "call_id": "c", "output": "x"}]),
        "input[0].call_id",
    ),
    (dict(text={"format": {"type": "json_schema", "name": "x"}}), "text.format.schema"),
    (dict(text={"verbosity": "high"}), "text.verbosity"),
    (dict(extra_body={"n": 2}), "n"),
    (dict(extra_body={"messages": []}), "messages"),
]


@pytest.mark.parametrize("fields, param", REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_honoured_is_refused(ask, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask("Yes", **fields)
    assert caught.value.body["param"] == param


def test_an_answer_follows_a_pydantic_model(talker):
    fields = dict(model="tiny", input="the capital", text_format=Weather, max_output_tokens=60)
    done = talker.client().responses.parse(**fields, extra_body={"seed": 1})
    assert isinstance(done.output_parsed, Weather) and done.status == "completed"
