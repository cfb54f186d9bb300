"""Faults while others are being answered, against a tiny model that really writes."""

import json
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from serving_live import live
from test_gate import CHAT, FULL, TEXT, mutated, post, send, spoilt, status

from gemma_jax.inference.engine import Engine

SAY = dict(model="tiny", messages=[{"role": "user", "content": "the capital"}], temperature=0)


def texts(server, count: int = 4) -> list[str]:
    """Greedy texts of several requests at once; what the model says must not depend on others."""

    def one(i: int) -> str:
        messages = [{"role": "user", "content": "the capital " * (i + 1)}]
        asked = SAY | {"messages": messages}
        client = server.client(max_retries=5)
        done = client.chat.completions.create(**asked, max_tokens=12)
        return done.choices[0].message.content

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def assert_idle(server, seconds: float = 10) -> None:
    """All slots are free again, and the server knows of no request."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stats = server.engine.stats()
        if not (stats["running"] or stats["waiting"] or server.app.state.server.running):
            return
        time.sleep(0.05)
    raise AssertionError(f"still at work: {stats}, {server.app.state.server.running}")


def vanish(server, read: int) -> None:
    """A stream that its client leaves after so many bytes, without a word."""
    body = json.dumps(SAY | {"stream": True, "max_tokens": 150, "ignore_eos": True}).encode()
    with socket.create_connection(server.address, timeout=10) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        wire.sendall(post(body))
        while read > 0 and (part := wire.recv(read)):
            read -= len(part)


def half(server) -> None:
    """A request that stops in the middle of its body, or of its head."""
    with socket.create_connection(server.address, timeout=10) as wire:
        wire.sendall(post(json.dumps(SAY).encode())[:-20])
    with socket.create_connection(server.address, timeout=10) as wire:
        wire.sendall(b"POST /v1/chat/compl")


def heavy(server) -> None:
    """Bodies that are too large, too deep, or no HTTP at all."""
    assert status(send(server, post(b"", length=1 << 40))) == 413
    assert status(send(server, post(b'{"messages":' + b"[" * 50_000))) == 400
    assert b" 400 " in send(server, b"\x16\x03\x01 hello\r\n\r\n", seconds=1)[:20]


HOSTILE = [
    {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    {"type": "string", "pattern": "(a{1,500}){1,500}b"},
    {"$ref": "#"},
    {"allOf": [{"anyOf": [{"pattern": "(a|b)*" + "(a|b)" * i} for i in range(20)]}] * 10},
    {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(300)}},
]


def hostile(server, which: int) -> None:
    """A schema that is made to cost time: refused, or followed, and soon."""
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": HOSTILE[which]}}
    body = json.dumps(SAY | {"response_format": wanted, "max_tokens": 2}).encode()
    began = time.monotonic()
    assert status(send(server, post(body), seconds=25)) in (200, 400, 429)
    assert time.monotonic() - began < 20


WIDE = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1000)}}


def test_a_grammar_that_gives_up_is_refused(talker):
    """It compiles, and meets a limit behind its first token."""
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": WIDE}}
    body = json.dumps(SAY | {"response_format": wanted, "max_tokens": 8}).encode()
    assert status(send(talker, post(body), seconds=25)) == 400


FAULTS = [lambda s: vanish(s, 0), lambda s: vanish(s, 600), half, heavy]
FAULTS += [lambda s, i=i: hostile(s, i) for i in range(1, len(HOSTILE))]
SLOW = pytest.param(lambda s: hostile(s, 0), marks=pytest.mark.nightly)  # seconds of masks


@pytest.mark.parametrize("fault", [*FAULTS, SLOW], ids=range(len(FAULTS) + 1))
def test_others_are_answered_as_ever(talker, fault):
    alone = texts(talker)
    failed = []

    def run():
        try:
            fault(talker)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert texts(talker) == alone
    for thread in threads:
        thread.join(30)
    assert failed == []
    assert_idle(talker)


@pytest.mark.parametrize("count", [40, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_no_mutation_disturbs_a_model_that_writes(talker, count):
    alone = texts(talker)
    rng = random.Random(1)
    routes = [(CHAT, FULL), (CHAT, SAY | {"max_tokens": 3}), ("/v1/completions", TEXT)]
    for number in range(count):
        path, body = rng.choice(routes)
        data = json.dumps(mutated(body, rng)).encode()
        data = spoilt(data, rng) if rng.random() < 0.3 else data
        answer = send(talker, post(data, path), seconds=25)
        assert answer and status(answer) < 500, data
        if number % 1000 == 999:
            assert texts(talker) == alone
    assert texts(talker) == alone
    assert_idle(talker)


def test_more_than_there_is_room_for_is_told_to_wait(served_by, talker):
    engine = Engine(talker.engine.model, slots=1, context=256, chunk=32, queue=2, budget=300)
    engine.start()
    told = []

    def ask(client):
        try:
            client.chat.completions.create(**SAY, max_tokens=100)
            told.append("answered")
        except openai.RateLimitError as error:
            assert int(error.response.headers["Retry-After"]) >= 1
            told.append("full")

    with live(served_by(engine, cfg=engine.model.cfg)) as server, ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda _: ask(server.client()), range(12)))
        assert_idle(server)
        ask(server.client())
    engine.close()
    assert len(told) == 13 and set(told) == {"answered", "full"} and told[-1] == "answered"
