"""Who may ask, how much, and what becomes of those that send something else."""

import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
from serving_live import ASK, live, saying

from gemma_jax.inference.requests import Piece
from gemma_jax.serving.auth import Keys
from gemma_jax.serving.errors import ApiError
from gemma_jax.serving.limits import RateLimit
from gemma_jax.serving.media import public_address

CHAT = "/v1/chat/completions"


def send(server, data: bytes, seconds: float = 5) -> bytes:
    """What comes back for raw bytes, until the server closes or nothing comes."""
    with socket.create_connection(server.address, timeout=seconds) as wire:
        wire.sendall(data)
        parts = []
        try:
            while part := wire.recv(65536):
                parts.append(part)
        except (TimeoutError, ConnectionResetError):
            pass
        return b"".join(parts)


def post(body: bytes, path: str = CHAT, length: int | None = None, **headers: str) -> bytes:
    given = {"Host": "x", "Content-Type": "application/json", "Connection": "close"} | headers
    given["Content-Length"] = str(len(body) if length is None else length)
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    "body, words",
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected an object"),
        (b'"x"', "expected an object"),
        (b"\xff\xfe", "not valid UTF-8"),
        (b'{"a":' * 100_000, "nested|not valid"),
        (b'{"messages":' + b"[" * 70 + b"]" * 70 + b"}", "nested more than 64"),
        (b'{"n": NaN}', "NaN is no number"),
        (b'{"n": 1e999}', "n: expected"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"user": "\\ud800"}', "lone surrogate"),
        (b'{"n": 1, "n": 2}', "given twice"),
    ],
    ids=range(12),
)
def test_bodies_that_are_none(scripted, body, words):
    answer = send(scripted, post(body))
    assert status(answer) == 400
    message = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert any(word in message for word in words.split("|"))


def test_bodies_that_are_too_large_or_never_come(scripted):
    assert status(send(scripted, post(b"", length=1 << 30))) == 413
    chunked = post(b"", **{"Transfer-Encoding": "chunked"}).replace(b"Content-Length: 0\r\n", b"")
    chunk = b"40000\r\n" + b"x" * 0x40000 + b"\r\n"
    # Who goes on sending may find the connection closed before the answer is read.
    assert send(scripted, chunked + chunk * 5)[:12] in (b"HTTP/1.1 413", b"")
    began = time.monotonic()
    assert status(send(scripted, post(b'{"model"', length=100))) == 408
    assert time.monotonic() - began < 4


def test_other_routes_and_types(scripted):
    assert status(send(scripted, post(b"{}", "/v1/nothing"))) == 404
    assert status(send(scripted, post(b"{}", "/v1/models"))) == 405
    assert status(send(scripted, post(b"{}", **{"Content-Type": "text/plain"}))) == 415
    foreign = {"Origin": "https://evil.example"}
    assert status(send(scripted, post(b"{}", **foreign))) == 403
    assert status(send(scripted, post(b"{}", Origin="http://x"))) == 400  # no messages


def test_keys(served_by, scripted, tokenizer, tmp_path):
    file = tmp_path / "keys"
    file.write_text("# people\nann sk-of-ann-1\nsk-of-nobody\n")
    with live(served_by(scripted.engine), keys=Keys.read(file), requests_per_minute=5) as closed:
        scripted.engine.script = saying(tokenizer, "Yes")
        for path in ("/v1/models", "/metrics", "/ready", "/nothing"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(closed.url + path)
        assert urllib.request.urlopen(closed.url + "/health").status == 200
        with pytest.raises(openai.AuthenticationError, match="valid API key"):
            closed.client(api_key="sk-of-ann-2").models.list()
        ann = closed.client(api_key="sk-of-ann-1")
        ann.chat.completions.create(**ASK)
        assert scripted.engine.requests[-1].owner == "ann"
        with pytest.raises(openai.RateLimitError, match="5 requests a minute") as caught:
            for _ in range(6):
                ann.models.list()
        assert 1 <= int(caught.value.response.headers["Retry-After"]) <= 12
        closed.client(api_key="sk-of-nobody").models.list()
        time.sleep(0.1)
        assert json.loads(closed.lines[-1])["owner"] == "key-2"
        text = closed.app.state.server.metrics.text()[0].decode()
        assert (
            'usage_tokens_total{engine="0",kind="generation",model_name="tiny",owner="ann"' in text
        )
        assert "sk-of" not in text + "".join(closed.lines)


def test_keys_that_are_none(tmp_path):
    for text in ("", "short\n", "a b c\n", "ann sk-of-ann-1\nann sk-of-ann-2\n"):
        (tmp_path / "keys").write_text(text)
        with pytest.raises(ValueError, match="entry|no key"):
            Keys.read(tmp_path / "keys")
    assert not Keys.read(None, {})
    assert Keys.read(None, {"GEMMA_JAX_API_KEYS": "sk-of-ann-1,sk-of-bob-1"})


def test_hosts_and_names_of_metrics(served_by, scripted):
    options = dict(hosts=("localhost", "127.0.0.1"), metrics_prefix="vllm:")
    with live(served_by(scripted.engine), **options) as local:
        rebound = post(b"{}", Host="evil.example")
        assert status(send(local, rebound)) == 421
        text = urllib.request.urlopen(local.url + "/metrics").read().decode()
    for name in ("num_requests_running", "prompt_tokens_total", "inter_token_latency_seconds_sum"):
        assert f"vllm:{name}" in text


def test_a_rate_is_a_rate():
    now = [0.0]
    rate = RateLimit(60, clock=lambda: now[0])
    for _ in range(60):
        rate.check("ann")
    with pytest.raises(ApiError):
        rate.check("ann")
    rate.check("bob")
    now[0] = 1.01
    rate.check("ann")
    with pytest.raises(ApiError):
        rate.check("ann")


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1"])
def test_private_addresses_are_not_fetched_from(address):
    with pytest.raises(ValueError, match="not public"):
        public_address(address)


def test_a_slow_reader_blocks_nobody(scripted, tokenizer):
    def endless(request):
        for _ in range(3000):
            yield Piece(token_ids=tokenizer.encode("Paris " * 40), finish_reason=None)
        yield 30.0

    scripted.engine.script = endless
    body = json.dumps(ASK | {"stream": True}).encode()
    with socket.create_connection(scripted.address) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.sendall(post(body))
        time.sleep(0.3)
        ticket = scripted.engine.tickets[-1]
        scripted.engine.script = saying(tokenizer, "Yes")
        began = time.monotonic()
        scripted.client().chat.completions.create(**ASK)
        assert time.monotonic() - began < 3
        assert ticket.cancelled.wait(10)  # who reads nothing loses the slot


def accepted(engine, count: int) -> None:
    """Waits until an engine has so many requests."""
    while len(engine.requests) < count:
        time.sleep(0.01)


def test_an_end_lets_requests_finish(served_by, scripted, tokenizer):
    scripted.engine.script = saying(tokenizer, "the capital of Paris", wait=0.3)
    with live(served_by(scripted.engine), grace=30) as server:
        told, count = [], len(scripted.engine.requests)

        def ask():
            told.append(server.client().chat.completions.create(**ASK))

        thread = threading.Thread(target=ask)
        thread.start()
        accepted(scripted.engine, count + 1)
        server.server.end()
        time.sleep(0.1)
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            server.client().chat.completions.create(**ASK)
        assert caught.value.status_code == 503
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(server.url + "/ready")
        thread.join(10)
        assert told[0].choices[0].message.content == "the capital of Paris"


def test_an_end_has_an_end(served_by, scripted):
    scripted.engine.script = lambda request: iter([30.0])
    with live(served_by(scripted.engine), grace=0.2) as server:
        count = len(scripted.engine.requests)

        def end():
            accepted(scripted.engine, count + 1)
            server.server.end()

        threading.Thread(target=end).start()
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            server.client().chat.completions.create(**ASK)
        assert scripted.engine.tickets[-1].cancelled.is_set()


STRANGE = [
    None,
    True,
    0,
    -1,
    1.5,
    1e308,
    2**70,
    "",
    "x" * 300,
    "\x00",
    "🐈",
    [],
    [[]],
    {},
    {"": {}},
]


def mutated(value, rng: random.Random):
    """The value with something strange somewhere in it."""
    if rng.random() < 0.15 or not isinstance(value, (dict, list)) or not value:
        return rng.choice(STRANGE)
    value = value.copy()
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    if isinstance(value, dict) and rng.random() < 0.1:
        value[rng.choice(["tools", "best_of", "x", "suffix", "functions"])] = rng.choice(STRANGE)
    value[key] = mutated(value[key], rng)
    return value


def spoilt(data: bytes, rng: random.Random) -> bytes:
    """The bytes with some of them changed or left out."""
    data = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(data) or 1)
        if rng.random() < 0.5 and data:
            data[at] = rng.randrange(256)
        else:
            del data[at : at + rng.randrange(1, 20)]
    return bytes(data) or b"{"


FULL = {
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "the capital"},
                {"type": "image_url", "image_url": {"url": "data:,x", "detail": "low"}},
            ],
        },
    ],
    "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "n": 2, "seed": 3, "stop": ["a"],
    "max_tokens": 3, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": 1}, "user": "ann",
    "stream": True, "stream_options": {"include_usage": True},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}},
}  # fmt: skip
TEXT = {
    "model": "tiny", "prompt": ["a", [5, 6]], "echo": True, "max_tokens": 2, "logprobs": None,
    "n": 2, "seed": 1, "stop": "x", "stream": False,
}  # fmt: skip


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_no_mutation_makes_the_server_fail_or_hang(scripted, tokenizer, count):
    scripted.engine.script = saying(tokenizer, "Yes")
    rng, seen = random.Random(0), set()
    routes = [(CHAT, FULL), (CHAT, ASK), ("/v1/completions", TEXT), ("/tokenize", {"prompt": "a"})]
    routes.append(("/detokenize", {"tokens": [5, 6]}))
    for _ in range(count):
        path, body = rng.choice(routes)
        data = json.dumps(mutated(body, rng)).encode()
        data = spoilt(data, rng) if rng.random() < 0.3 else data
        answer = send(scripted, post(data, path), seconds=10)
        assert answer, data
        seen.add(status(answer))
        assert status(answer) < 500, data
        assert b"Traceback" not in answer
    assert {200, 400} <= seen
    assert scripted.client().models.list().data
    time.sleep(0.2)
    assert not scripted.app.state.server.running
