"""Prompts that are refused, and answers that are withheld, with a judge that reads for one word."""

import json
import time

import openai
import pytest
from serving_live import ASK, Scripted, live, saying
from test_openai_client import picture

OPTIONS = dict(stream=True, stream_options={"include_usage": True})


class Judge:
    """Finds fault with a word in whatever it is told to judge."""

    def __init__(self, word: str):
        self.word, self.seen = word, []

    def __call__(self, question, answer, pictures):
        self.seen.append((question, answer, len(pictures)))
        judged = question if answer is None else answer
        return "rudeness" if self.word in judged else None


@pytest.fixture(scope="module")
def judged(served_by):
    judge, engine = Judge("Räk"), Scripted()
    with live(served_by(engine, checks=[judge])) as running:
        running.judge = judge
        yield running


@pytest.fixture
def ask(judged, tokenizer):
    def call(text="Paris", **fields):
        judged.engine.script = saying(tokenizer, text)
        judged.judge.seen.clear()
        return judged.client().chat.completions.create(**(ASK | fields))

    return call


def test_a_prompt_that_is_refused(ask, judged):
    turns = [("system", "Be kind."), ("user", "Räksm"), ("assistant", "No"), ("user", "And now?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    count = len(judged.engine.requests)
    for stream in (False, True):
        with pytest.raises(
            openai.BadRequestError, match="violates the policy 'rudeness'"
        ) as caught:
            ask(messages=messages, stream=stream)
        assert caught.value.code == "content_filter"
    assert len(judged.engine.requests) == count  # nothing was asked of the model
    assert judged.judge.seen == [("Be kind.\n\nRäksm\n\nNo\n\nAnd now?", None, 0)]
    time.sleep(0.1)
    assert json.loads(judged.lines[-1])["error"] == "content_filter"


def test_an_answer_that_passes(ask, judged):
    done = ask()
    assert done.choices[0].message.content == "Paris" and done.choices[0].finish_reason == "stop"
    assert judged.judge.seen == [("Hi", None, 0), ("Hi", "Paris", 0)]
    *events, last = ask(**OPTIONS, logprobs=True)
    texts = [event.choices[0].delta.content for event in events if event.choices]
    assert [text for text in texts if text] == ["Paris"]  # whole, once it was checked
    assert last.usage.completion_tokens == done.usage.completion_tokens
    tokens = [t for e in events for c in e.choices if c.logprobs for t in c.logprobs.content]
    assert "".join(token.token for token in tokens).strip() == "Paris"


def test_an_answer_that_is_withheld(ask, judged):
    done = ask("Yes, Räksmörgås")
    assert done.choices[0].finish_reason == "content_filter"
    assert done.choices[0].message.content == ""
    assert "Räk" not in done.model_dump_json() and done.usage.completion_tokens > 3
    events = list(ask("Yes, Räksmörgås", **OPTIONS, logprobs=True))
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "content_filter"
    assert "Yes" not in "".join(event.model_dump_json() for event in events)
    time.sleep(0.1)  # the log is written behind the answer
    assert json.loads(judged.lines[-1])["finish"] == ["content_filter"]
    text = judged.app.state.server.metrics.text()[0].decode()
    assert 'finished_reason="content_filter"' in text


def test_responses_are_withheld(ask, judged, tokenizer):
    judged.engine.script = saying(tokenizer, "Yes, Räksmörgås")
    done = judged.client().responses.create(model="tiny", input="Hi", max_output_tokens=60)
    assert done.status == "incomplete" and done.incomplete_details.reason == "content_filter"
    assert "Räk" not in done.model_dump_json()
    judged.engine.script = saying(tokenizer, "Paris")
    assert judged.client().responses.create(model="tiny", input="Hi").output_text == "Paris"


def test_calls_are_judged(served_by, tokenizer):
    """What a call would hand to a tool is part of the answer, and later of the prompt."""
    judge, engine = Judge("Räk"), Scripted()
    where = {"type": "object", "properties": {"where": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "rain", "parameters": where}}
    made = []
    with live(served_by(engine, context=4096, checks=[judge])) as server:
        for place in ("Paris", "Räk"):
            call = json.dumps({"name": "rain", "parameters": {"where": place}}, ensure_ascii=False)
            engine.script = saying(tokenizer, call)
            made.append(server.client().chat.completions.create(**ASK, tools=[tool]).choices[0])
        assert made[0].finish_reason == "tool_calls" and made[1].finish_reason == "content_filter"
        assert not made[1].message.tool_calls
        call = made[0].message.tool_calls[0].model_dump()
        call["function"]["arguments"] = json.dumps({"where": "Räk"}, ensure_ascii=False)
        said = {"role": "assistant", "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": call["id"], "content": "wet"}
        messages = [*ASK["messages"], said, result]
        with pytest.raises(openai.BadRequestError, match="the prompt violates"):
            server.client().chat.completions.create(**ASK | {"messages": messages}, tools=[tool])


def test_completions(judged, tokenizer):
    script = {"Hi": saying(tokenizer, "Paris"), "Ho": saying(tokenizer, "Räk")}
    judged.engine.script = lambda request: script[tokenizer.decode(request.prompt.token_ids)[-2:]](
        request
    )
    judged.judge.seen.clear()
    ids = tokenizer.encode("Hi")
    done = judged.client().completions.create(model="tiny", prompt=["Hi", "Ho"], max_tokens=9, n=2)
    reasons = [choice.finish_reason for choice in done.choices]
    assert reasons == ["stop", "stop", "content_filter", "content_filter"]
    assert [choice.text for choice in done.choices] == ["Paris", "Paris", "", ""]
    judged.client().completions.create(model="tiny", prompt=ids, max_tokens=9)
    assert judged.judge.seen[-1] == ("Hi", "Paris", 0)
    with pytest.raises(openai.BadRequestError, match="rudeness"):
        judged.client().completions.create(model="tiny", prompt=["Hi", "Räksm"], max_tokens=9)


def test_pictures_are_judged(talker, served_by):
    """Of a model that sees; whoever judges them sees them as they came."""
    judge = Judge("nothing")
    with live(served_by(Scripted(), cfg=talker.engine.model.cfg, checks=[judge])) as server:
        url = {"url": picture(0)}
        content = [{"type": "text", "text": "the"}, {"type": "image_url", "image_url": url}]
        server.engine.script = lambda request: ValueError("enough")
        with pytest.raises(openai.BadRequestError, match="enough"):
            server.client().chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": content}]
            )
    assert judge.seen == [("the", None, 1)]


def test_a_judge_that_fails_lets_nothing_out(served_by, tokenizer):
    def broken(question, answer, pictures):
        raise ValueError("9000 tokens to judge are more than the 8192 that fit the judge")

    engine = Scripted()
    engine.script = saying(tokenizer, "Paris")
    with live(served_by(engine, checks=[broken])) as server:
        with pytest.raises(openai.BadRequestError, match="that fit the judge"):
            server.client().chat.completions.create(**ASK)
    assert not engine.requests
