"""The benchmark of servers: what its clients ask and see, and its figures."""

import asyncio
import itertools
import json
import sys

import pytest
from serving_live import saying

from gemma_jax.benchmarks import http_servers, serving
from gemma_jax.benchmarks.http_load import Ask, Mix, Told, ask, crowd
from gemma_jax.inference.requests import Full


@pytest.fixture(scope="module")
def mix():
    return Mix(list(range(5, 300)), bos=2, shared=20, own=(3, 9), new=(4, 8))


def test_prompts_are_drawn_by_seed(mix):
    first, again, other = (list(itertools.islice(mix.asks(seed), 20)) for seed in (0, 0, 1))
    assert first == again != other
    assert {tuple(one.prompt[:20]) for one in [*first, *other]} == {tuple(mix.beginning(0))}
    assert {len(one.prompt) - 20 for one in first} <= set(range(3, 10))
    assert {one.new_tokens for one in first} <= set(range(4, 9))
    pairs = mix.pairs(4, seed=0)
    assert all(a.prompt[:20] == b.prompt[:20] for a, b in pairs)
    assert len({tuple(a.prompt[:20]) for a, _ in pairs} | {tuple(mix.beginning(0))}) == 5


def test_clients_see_what_comes_when_it_comes(scripted, tokenizer):
    scripted.engine.script = saying(tokenizer, "the capital of France", wait=0.05)
    port, one = scripted.address[1], Ask([5, 6, 7], 20)
    told = asyncio.run(ask(port, one))
    tokens = len(tokenizer.encode("the capital of France"))
    assert told.error == "" and told.new >= tokens and (told.prompt, told.cached) == (3, 1)
    request = scripted.engine.requests[-1]
    assert (request.prompt.token_ids, request.max_new_tokens) == ([5, 6, 7], 20)
    assert request.stop_ids == () and request.sampling.temperature == 0
    assert 0.03 < sorted(told.delays_s)[len(told.delays_s) // 2] < 0.2
    assert told.sent < told.arrivals[0] < told.arrivals[-1] <= told.ended


def test_what_fails_is_counted(scripted, tokenizer, mix):
    say, count = saying(tokenizer, "Yes", wait=0.02), itertools.count()
    scripted.engine.script = lambda r: Full("no", 1) if next(count) % 3 == 1 else say(r)
    asks = itertools.islice(mix.asks(0), 9)
    told = asyncio.run(crowd(scripted.address[1], asks, clients=2, seconds=20))
    found = serving.summary(told, 2.0)
    assert (found["requests"], found["failed"]) == (9, 3) and "429" in found["errors"][0]
    assert found["new_tokens_per_s"] == found["new_tokens"] / 2
    assert "3 failed" in serving.brief(found)
    nobody = asyncio.run(crowd(1, iter([Ask([5], 1)]), clients=3, seconds=1))
    assert len(nobody) == 1 and nobody[0].error
    assert serving.summary(nobody, 1.0)["first_token_s"] == {}


def test_nobody_asks_after_the_time(scripted, tokenizer, mix):
    scripted.engine.script = saying(tokenizer, "Yes", wait=0.05)
    told = asyncio.run(crowd(scripted.address[1], mix.asks(0), clients=3, seconds=0.4))
    assert 3 <= len(told) < 100 and not any(one.error for one in told)


def test_growth_is_that_of_the_later_half():
    assert serving.growth([(0, 10), (1, 100), (2, 100), (3, 100)]) == 0
    assert serving.growth([(i, 5 * i) for i in range(8)]) == 20
    assert serving.growth([(0, 7)]) == 0


def test_figures_of_one_answer():
    told = Told(sent=1.0, ended=4.0, arrivals=[2.0, 2.5, 4.0], new=9)
    assert (told.first_token_s, told.delays_s, told.token_s) == (1.0, [0.5, 1.5], 0.25)


def test_a_server_that_does_not_start_says_why():
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with pytest.raises(RuntimeError, match="no such model"):
        with http_servers.start("x", command):
            pass


SHORT = (
    "--model checkpoints/digits --slots 2 --clients 3 --context 64 --shared 20 --own 2 6 --new 3 8 "
    "--pairs 0 --short"
).split()


@pytest.mark.nightly
@pytest.mark.parametrize("minutes", [0, 0.05])
def test_a_short_run(tmp_path, minutes):
    output = tmp_path / "result.json"
    words = [*SHORT, "--minutes", str(minutes), "--sample-seconds", "0.5"]
    found = serving.main([*words, "--output", str(output)])
    assert json.loads(output.read_text()) == json.loads(json.dumps(found))
    if minutes:
        assert found["long"]["failed"] == 0 and len(found["long"]["resident_bytes"]) > 3
        return
    (ours,) = found["servers"].values()
    assert ours["rounds"][0]["failed"] == 0 and ours["tokens_per_s"] > 0
    assert str(tmp_path) not in output.read_text()
