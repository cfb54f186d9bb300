"""The openai client as it is, against a tiny model that really writes."""

import base64
import io

import numpy as np
import openai
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
    model = talker.engine._model
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


def test_what_the_engine_cannot_do_is_refused(client):
    with pytest.raises(openai.BadRequestError, match="top_logprobs is not available"):
        client.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
