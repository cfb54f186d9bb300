"""Requests that never begin."""

import socket
import time

import pytest
from serving_live import ASK, Scripted, live, saying


@pytest.fixture(scope="module")
def impatient(served_by):
    with live(served_by(Scripted()), head_seconds=0.4) as running:
        yield running


@pytest.mark.parametrize("sent", [b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nHost: x\r\nA"])
def test_half_a_head_is_not_waited_for(impatient, sent):
    with socket.create_connection(impatient.address, timeout=10) as wire:
        began = time.monotonic()
        wire.sendall(sent)
        assert wire.recv(100) == b""
        assert 0.3 < time.monotonic() - began < 3


def test_a_second_half_head_on_a_kept_connection(impatient):
    with socket.create_connection(impatient.address, timeout=10) as wire:
        whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        wire.sendall(whole)
        assert b"200" in wire.recv(4096)
        began = time.monotonic()
        wire.sendall(whole[:20])
        while wire.recv(4096):
            pass
        assert time.monotonic() - began < 3


def test_slow_answers_go_on(impatient, tokenizer):
    impatient.engine.script = saying(tokenizer, "the capital", wait=0.3)
    done = impatient.client().chat.completions.create(**ASK)
    assert done.choices[0].message.content == "the capital"
