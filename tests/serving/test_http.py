"""What goes over the wire, with an engine that says what it is told to say."""

import json
import time
import urllib.request

import openai
import pytest
from serving_live import ASK, saying

from gemma_jax.inference.requests import Full, Piece


@pytest.fixture
def ask(scripted, tokenizer):
    """`ask(text, **fields)`: what the client gets when the model says a text."""

    def call(text="Paris is the capital.", script=None, **fields):
        scripted.engine.script = script or saying(tokenizer, text)
        return scripted.client().chat.completions.create(**(ASK | fields))

    return call


def test_an_answer(ask, scripted):
    done = ask(seed=3, temperature=0.5, max_tokens=7)
    choice = done.choices[0]
    assert choice.message.content == "Paris is the capital."
    assert choice.message.role == "assistant" and choice.finish_reason == "stop"
    request = scripted.engine.requests[-1]
    assert (request.seed, request.sampling.temperature, request.max_new_tokens) == (3, 0.5, 7)
    assert done.usage.prompt_tokens == len(request.prompt.token_ids)
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.prompt_tokens_details.cached_tokens == 1
    assert done.model == "tiny" and done.id.startswith("chatcmpl-")


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_stream_adds_up(ask, tokenizer, size):
    text = "Räksmörgås: Paris 🐈 is"
    script = saying(tokenizer, text, size=size)
    events = list(ask(script=script, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    parts = [e.choices[0].delta.content or "" for e in events if e.choices]
    assert "".join(parts) == text and "\ufffd" not in "".join(parts)
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "stop"
    assert events[-1].choices == [] and events[-1].usage.completion_tokens > 5
    assert all(e.usage is None for e in events[:-1])


def test_the_bytes_of_a_stream(scripted, tokenizer):
    scripted.engine.script = saying(tokenizer, "Paris")
    body = json.dumps(ASK | {"stream": True}).encode()
    headers = {"Content-Type": "application/json"}
    http = urllib.request.Request(scripted.url + "/v1/chat/completions", body, headers)
    with urllib.request.urlopen(http) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        lines = answer.read().decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_log_probs_are_of_the_text_that_is_told(ask, tokenizer, stream):
    text = "is é"
    done = ask(text, logprobs=True, top_logprobs=2, stream=stream)
    events = list(done) if stream else [done]
    content = [
        entry for e in events for c in e.choices if c.logprobs for entry in c.logprobs.content
    ]
    assert bytes(b for entry in content for b in entry.bytes).decode() == text
    assert all(entry.logprob == -0.5 for entry in content)
    assert all(entry.top_logprobs[1].logprob == -9999.0 for entry in content)
    assert len(content) == len(tokenizer.encode(text))


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_the_answer_and_frees_the_slot(ask, scripted, tokenizer, stream):
    def script(request):
        yield from list(saying(tokenizer, "Paris is the capital")(request))[:-1]
        yield 20.0  # until it is cancelled

    done = ask(script=script, stop=["the", "nothing"], logprobs=True, stream=stream)
    events = list(done) if stream else [done]
    text = "".join(
        (c.delta if stream else c.message).content or "" for e in events for c in e.choices
    )
    assert text == "Paris is "
    assert events[-1].choices[0].finish_reason == "stop"
    told = [t for e in events for c in e.choices if c.logprobs for t in c.logprobs.content]
    assert "".join(t.token for t in told).startswith("Paris is ")
    assert "capital" not in "".join(t.token for t in told)
    assert scripted.engine.tickets[-1].cancelled.is_set()


def test_several_answers_by_index(ask, scripted):
    done = ask(n=3, seed=2**32 - 1)
    assert [c.index for c in done.choices] == [0, 1, 2]
    assert [r.seed for r in scripted.engine.requests[-3:]] == [2**32 - 1, 0, 1]
    assert done.usage.prompt_tokens == len(scripted.engine.requests[-1].prompt.token_ids)
    events = list(ask("Yes", n=2, stream=True))
    texts = ["", ""]
    for e in events:
        texts[e.choices[0].index] += e.choices[0].delta.content or ""
    assert texts == ["Yes", "Yes"]


@pytest.mark.parametrize(
    "reason, told", [("stop", "stop"), ("length", "length"), ("deadline", "length")]
)
def test_reasons(ask, tokenizer, reason, told):
    done = ask(script=saying(tokenizer, "Yes", reason=reason))
    assert done.choices[0].finish_reason == told


def test_completions(scripted, tokenizer):
    scripted.engine.script = saying(tokenizer, " is Paris")
    create = scripted.client().completions.create
    done = create(model="tiny", prompt=["the capital", "of"], logprobs=1, n=2, max_tokens=5)
    assert [c.index for c in done.choices] == [0, 1, 2, 3]
    first = done.choices[0]
    assert first.text == " is Paris" and "".join(first.logprobs.tokens) == first.text
    assert first.logprobs.text_offset[0] == 0 and len(first.logprobs.top_logprobs[0]) == 1
    lengths = {len(r.prompt.token_ids) for r in scripted.engine.requests[-4:]}
    assert done.usage.prompt_tokens == sum(
        len(tokenizer.encode(t, bos=True)) for t in ("the capital", "of")
    )
    assert lengths
    ids = tokenizer.encode("the capital", bos=True)
    echoed = create(model="tiny", prompt=ids, echo=True)
    assert echoed.choices[0].text == tokenizer.decode(ids) + " is Paris"
    assert scripted.engine.requests[-1].prompt.token_ids == ids
    streamed = create(model="tiny", prompt="the", stream=True)
    assert "".join(e.choices[0].text for e in streamed) == " is Paris"


REFUSED = [
    (dict(tempature=1), "tempature.*did you mean 'temperature'"),
    (dict(temperature="hot"), "temperature: expected a number, got a text"),
    (dict(top_p=0), "top_p=0 must be above 0"),
    (dict(n=100), "n: expected 1 to 8, got 100"),
    (dict(presence_penalty=3), "presence_penalty: expected -2 to 2"),
    (dict(max_tokens=2, max_completion_tokens=3), "not both"),
    (dict(max_tokens=1000), "context"),
    (dict(top_logprobs=2), "needs logprobs"),
    (dict(logit_bias={"x": 1}), "logit_bias.x: expected a token id"),
    (dict(stop=[""]), "stop: expected"),
    (dict(stop=["a<eos>b"]), "special token"),
    (dict(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools"),
    (dict(response_format={"type": "json_object"}), "not available on this server"),
    (dict(response_format={"type": "yaml"}), "response_format.type: expected"),
    (dict(messages=[]), "at least one message"),
    (dict(messages=[{"role": "robot", "content": "Hi"}]), r"messages\[0\].role: expected"),
    (dict(messages=[{"role": "user", "content": 3}]), r"messages\[0\].content"),
    (dict(messages=[{"role": "user", "content": "Hi", "name": "Ann"}]), r"messages\[0\].name"),
    (dict(messages=[{"role": "assistant", "content": "Hi"}]), "alternate"),
    (dict(store=True), "store"),
    (dict(chat_template="{{ 1 }}"), "chat_template: unknown field"),
    (dict(stream_options={"include_usage": True}), "streams alone"),
]


@pytest.mark.parametrize("fields, words", REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_not_honoured_is_refused(ask, fields, words):
    known = ("tempature", "chat_template")
    extra = {name: fields[name] for name in fields if name in known}
    fields = {name: fields[name] for name in fields if name not in known}
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        ask(**fields, extra_body=extra)
    body = caught.value.body
    assert set(body) == {"message", "type", "param", "code"}
    assert body["type"] == "invalid_request_error"


def test_a_model_that_is_not_served(scripted):
    with pytest.raises(openai.NotFoundError, match="there is tiny"):
        scripted.client().chat.completions.create(**(ASK | {"model": "gpt-5"}))
    assert [m.id for m in scripted.client().models.list()] == ["tiny"]
    assert scripted.client().models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        scripted.client().models.retrieve("a/b")
    with pytest.raises(openai.BadRequestError, match="no head for embeddings"):
        scripted.client().embeddings.create(model="tiny", input="Hi")


def test_a_full_engine_is_asked_again(scripted, tokenizer):
    answers = [Full("40 requests wait already", 0.2), saying(tokenizer, "Yes")]

    def script(request):
        answer = answers.pop(0)
        return answer if isinstance(answer, Exception) else answer(request)

    scripted.engine.script = script
    with pytest.raises(openai.RateLimitError, match="wait already") as caught:
        scripted.client().chat.completions.create(**ASK)
    assert caught.value.response.headers["Retry-After"] == "1"
    answers.insert(0, Full("40 requests wait already", 0.2))
    done = scripted.client(max_retries=2).chat.completions.create(**ASK)
    assert done.choices[0].message.content == "Yes"


def test_an_engine_that_fails(ask):
    def script(request):
        yield Piece(token_ids=[9], log_probs=[0.0])
        yield Piece(finish_reason="error", error="no memory")

    with pytest.raises(openai.InternalServerError, match="no memory"):
        ask(script=script)
    with pytest.raises(openai.APIError, match="no memory"):
        list(ask(script=script, stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(scripted, stream):
    scripted.engine.script = lambda request: iter([30.0])
    with pytest.raises(openai.APITimeoutError):
        answer = scripted.client(timeout=0.3).chat.completions.create(**ASK, stream=stream)
        list(answer)
    assert scripted.engine.tickets[-1].cancelled.wait(3)


def test_what_is_logged_and_counted(ask, scripted):
    ask(user="ann")
    time.sleep(0.1)
    line = json.loads(scripted.lines[-1])
    assert line["route"] == "/v1/chat/completions" and line["status"] == 200
    assert line["user"] == "ann" and line["completion_tokens"] > 1 and line["finish"] == ["stop"]
    assert "Paris" not in scripted.lines[-1] and "Hi" not in scripted.lines[-1]
    with urllib.request.urlopen(scripted.url + "/metrics") as answer:
        text = answer.read().decode()
    assert 'gemma_jax_request_success_total{engine="0",finished_reason="stop"' in text
    assert "gemma_jax_time_to_first_token_seconds_bucket" in text
    assert 'gemma_jax_num_requests_running{engine="0",model_name="tiny"} 0.0' in text


def test_usage_of_every_event(ask, tokenizer):
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = list(ask(stream=True, stream_options=options))
    counts = [event.usage.completion_tokens for event in events]
    assert counts == sorted(counts) and counts[0] == 0
    assert counts[-1] == len(tokenizer.encode("Paris is the capital.")) + 1
    with pytest.raises(openai.BadRequestError, match="needs include_usage"):
        ask(stream=True, stream_options={"continuous_usage_stats": True})
