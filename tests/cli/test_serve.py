"""What only the command does: refusals in one line, and an orderly end."""

import json
import os
import signal
import subprocess
import sys
import urllib.request

import pytest
from parity.goldens import DATA


@pytest.mark.parametrize(
    "words, said",
    [
        (("--host", "0.0.0.0"), "keys are needed; give --api-key-file"),
        (("--api-key-file", "nowhere"), "nowhere"),
        (("--api-key-file", __file__), "entry 1: expected a key"),
        (("--shield", "nowhere"), "nowhere"),
        (("--context", 100_000), "--context 100000: the model's own is 512"),
        (("--shield-threshold", 0.5), "--shield-threshold: nothing is judged without --shield"),
    ],
)
def test_refusals(refused, talker, words, said):
    assert said in refused("serve", "--model", talker, "--port", 0, *words)


@pytest.mark.parametrize(
    "words",
    [
        ("--slots", 8),
        ("--prefix-cache-mb", 0),
        ("--max-new-tokens", 5),
        ("--speculate", "lookup", "--context", 64),
        ("--allow-media-domains", "example.com"),
        ("--cache-dtype", "int8"),
    ],
    ids=lambda words: words[0],
)
def test_what_is_for_models_that_write_is_refused_for_one_that_makes_vectors(refused, words):
    model = DATA / "embedding" / "tiny"
    said = refused("serve", "--model", model, "--port", 0, *words)
    flags = [str(word) for word in words if str(word).startswith("--")]
    assert said.startswith(f"{', '.join(sorted(flags))}: tiny makes vectors of texts")


def test_a_server_answers_and_ends_in_order(talker):
    words = ["-m", "gemma_jax", "serve", "--model", str(talker), "--port", "0"]
    with subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, text=True, env=os.environ
    ) as server:
        try:
            url = server.stderr.readline().split()[-1]
            body = json.dumps({"prompt": "the", "max_tokens": 2, "temperature": 0}).encode()
            headers = {"Content-Type": "application/json"}
            http = urllib.request.Request(url + "/completions", body, headers)
            with urllib.request.urlopen(http, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] in (1, 2)
            server.send_signal(signal.SIGTERM)
            assert server.wait(20) == 0
        finally:
            server.kill()
        line = json.loads(server.stderr.read())
    assert line["status"] == 200 and line["route"] == "/v1/completions"
