"""Vectors of texts over HTTP, for the openai client as it is."""

import json
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from parity.goldens import DATA
from serving_live import live

import gemma_jax as gj
from gemma_jax.serving.served import Served
from gemma_jax.text_embedding.embedder import Embedder, TooManyError

FOLDER = DATA / "embedding" / "tiny"
TEXTS = ["two people at work", "x", "a man is playing a guitar in the park"]


@pytest.fixture(scope="module")
def loaded():
    return gj.load(FOLDER, dtype="float32", layout="scan")


@pytest.fixture(scope="module")
def server(loaded):
    model, tokenizer = loaded
    embedder = Embedder(model)
    served = Served(name="tiny", cfg=model.cfg, tokenizer=tokenizer, engine=embedder, context=64)
    embedder.start()
    with live(served) as running:
        yield running
    embedder.close()


def vectors(done):
    assert [one.index for one in done.data] == list(range(len(done.data)))
    return np.array([one.embedding for one in done.data], np.float32)


def test_texts(server, loaded):
    client = server.client()
    done = client.embeddings.create(model="tiny", input=TEXTS, extra_body={"task": "query"})
    expected = gj.embed(*loaded, TEXTS, task="query")
    np.testing.assert_allclose(vectors(done), expected, atol=8e-7)
    assert done.usage.prompt_tokens == done.usage.total_tokens > len(TEXTS)
    short = client.embeddings.create(
        model="tiny", input=TEXTS[0], dimensions=128, encoding_format="float"
    )
    np.testing.assert_allclose(
        vectors(short), gj.embed(*loaded, TEXTS[0], dimensions=128), atol=8e-7
    )


def test_token_ids_are_taken_as_they_are(server, loaded):
    ids = [*loaded[1].encode(TEXTS[0], bos=True), loaded[1].eos_id]
    done = server.client().embeddings.create(model="tiny", input=[ids, ids])
    expected = gj.embed(*loaded, [TEXTS[0]] * 2)
    np.testing.assert_allclose(vectors(done), expected, atol=8e-7)


def test_many_at_once(server, loaded):
    client = server.client()

    def ask(n):
        texts = TEXTS[: 1 + n % 3]
        return n, vectors(client.embeddings.create(model="tiny", input=texts, dimensions=64 + n))

    with ThreadPoolExecutor(8) as pool:
        for n, made in pool.map(ask, range(16)):
            expected = gj.embed(*loaded, TEXTS[: 1 + n % 3], dimensions=64 + n)
            np.testing.assert_allclose(made, expected, atol=8e-7)


@pytest.mark.parametrize(
    "body, message",
    [
        (dict(input=[]), "none empty"),
        (dict(input=""), "none empty"),
        (dict(input=["x", ""]), "none empty"),
        (dict(input=[["x"]]), "none empty"),
        (dict(input=[[10**9]]), "token ids in"),
        (dict(input="x", dimensions=4096), "dimensions: expected 1 to 768"),
        (dict(input="x", encoding_format="int8"), "'float' or 'base64'"),
        (dict(input="x", extra_body={"task": "quary"}), "did you mean 'query'"),
        (dict(input=[[2, 1]], extra_body={"task": "query"}), "have their prompt already"),
        (dict(input=["word " * 9000]), "truncate"),
        (dict(input="x", extra_body={"quantise": 1}), "unknown field"),
        (dict(input=["x"] * 2049), "more than 2048"),
    ],
)
def test_what_is_refused(server, body, message):
    with pytest.raises(openai.BadRequestError, match=message):
        server.client().embeddings.create(model="tiny", **body)


def test_it_writes_no_text(server):
    with pytest.raises(openai.BadRequestError, match="ask /v1/embeddings"):
        server.client().completions.create(model="tiny", prompt="x")
    message = {"role": "user", "content": "x"}
    with pytest.raises(openai.BadRequestError, match="ask /v1/embeddings"):
        server.client().chat.completions.create(model="tiny", messages=[message])


def test_tokens_are_counted(server):
    server.client().embeddings.create(model="tiny", input="x")
    with urllib.request.urlopen(server.url + "/metrics") as answer:
        text = answer.read().decode()
    (line,) = [x for x in text.splitlines() if x.startswith("gemma_jax_prompt_tokens_total")]
    assert float(line.split()[-1]) > 0
    assert json.loads(server.lines[-2])["route"] == "/v1/embeddings"


def test_a_bound_on_who_waits_and_an_end(loaded):
    embedder = Embedder(loaded[0], queue=1)
    first = embedder.submit([[2, 1]])
    with pytest.raises(TooManyError, match="1 requests wait"):
        embedder.submit([[2, 1]])
    embedder.close()
    assert first.cancelled()
    with pytest.raises(TooManyError, match="about to stop"):
        embedder.submit([[2, 1]])


def test_a_fault_ends_its_own_call_alone(loaded):
    embedder = Embedder(loaded[0])
    good, bad, gone = (embedder.submit(rows) for rows in ([[2, 1]], [[10**9]], [[2, 5, 1]]))
    gone.cancel()
    embedder.start()
    assert good.result(60).shape == (1, 768)
    with pytest.raises(ValueError, match="ids must lie in"):
        bad.result(60)
    assert threading.active_count() > 1 and gone.cancelled()
    embedder.close()
