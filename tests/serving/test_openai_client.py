"""The openai client as it is, against a tiny model that really writes."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import openai
import pydantic
import pytest

from gemma_jax import Image
from gemma_jax.inference.generate import generate

ASK = dict(model="tiny", messages=[{"role": "user", "content": "the capital"}], max_tokens=8)


@pytest.fixture(scope="module")
def client(talker):
    return talker.client()


def picture(level: int = 0, side: int = 30) -> str:
    png = io.BytesIO()
    Image(np.full((side, side, 3), level, np.uint8)).to_pil().save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def test_the_text_is_that_of_generate(client, talker, tokenizer):
    model = talker.engine.model
    alone = generate(model, tokenizer, ASK["messages"], max_new_tokens=8)
    done = client.chat.completions.create(**ASK, temperature=0)
    assert done.choices[0].message.content == alone.text
    assert done.choices[0].finish_reason == alone.finish_reason
    assert done.usage.completion_tokens == len(alone.token_ids)
    assert done.usage.prompt_tokens == len(alone.prompt_token_ids)
    streamed = client.chat.completions.create(**ASK, temperature=0, stream=True)
    assert "".join(e.choices[0].delta.content or "" for e in streamed) == alone.text


def test_a_seed_tells_the_text(client):
    def text(**fields):
        done = client.chat.completions.create(**ASK, temperature=1, **fields)
        return [choice.message.content for choice in done.choices]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=1, n=2) == [*text(seed=1), *text(seed=2)]


def test_pictures_are_seen(client):
    def ask(url):
        parts = [{"type": "text", "text": "the"}, {"type": "image_url", "image_url": {"url": url}}]
        fields = ASK | {"messages": [{"role": "user", "content": parts}]}
        done = client.chat.completions.create(**fields, temperature=0, logprobs=True)
        return [token.logprob for token in done.choices[0].logprobs.content]

    assert ask(picture(0)) != ask(picture(255))


@pytest.mark.parametrize(
    "url, words",
    [
        ("/etc/passwd", "expected a data: URL"),
        ("file:///etc/passwd", "expected a data: URL"),
        ("https://example.com/cat.png", "others are not fetched"),
        ("data:image/png;base64,!!!!", "no base64"),
        ("data:image/png;base64,AAAA", "no image that can be read"),
        ("data:text/plain;base64,AAAA", "of type image"),
        (picture(side=5000), "pixels are more than"),
    ],
    ids=range(7),
)
def test_pictures_that_are_not(client, url, words):
    parts = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(**ASK | {"messages": [{"role": "user", "content": parts}]})


class Answer(pydantic.BaseModel):
    """What `parse` shall return."""

    capital: bool
    kind: Literal["a", "b"]


def test_an_answer_follows_a_pydantic_model(client):
    fields = ASK | {"max_tokens": 60}
    done = client.chat.completions.parse(**fields, response_format=Answer, seed=1)
    assert isinstance(done.choices[0].message.parsed, Answer)
    assert done.choices[0].finish_reason == "stop"
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**ASK, response_format=Answer)
    yes = client.chat.completions.create(**fields, n=2, extra_body={"guided_regex": "Yes|No"})
    assert {choice.message.content for choice in yes.choices} <= {"Yes", "No"}
    with pytest.raises(openai.BadRequestError, match="guided_regex"):
        client.chat.completions.create(**ASK, extra_body={"guided_regex": "("})


def test_biases_and_probable_tokens(client, tokenizer):
    yes = tokenizer.encode("Yes")[0]
    done = client.chat.completions.create(
        **ASK, temperature=0, logit_bias={yes: 100}, logprobs=True, top_logprobs=3
    )
    assert set(done.choices[0].message.content.replace("Yes", "")) == set()
    first = done.choices[0].logprobs.content[0]
    values = [one.logprob for one in first.top_logprobs]
    assert len(values) == 3 and values == sorted(values, reverse=True)


def test_many_at_once_are_answered_as_alone(client):
    def ask(i):
        done = client.chat.completions.create(**ASK, temperature=1, seed=i)
        return done.choices[0].message.content

    alone = [ask(i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == alone


def test_a_beginning_that_was_read_is_told_of(client):
    system = {"role": "system", "content": "the capital of France is Paris. " * 4}
    fields = ASK | {"messages": [system, *ASK["messages"]], "temperature": 0}
    first, second = (client.chat.completions.create(**fields) for _ in range(2))
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage.prompt_tokens_details.cached_tokens >= 32
    assert first.choices == second.choices
