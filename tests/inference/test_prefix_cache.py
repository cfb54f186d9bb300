"""Beginnings of prompts that were read before: the text is the same, bit for bit."""

import numpy as np
import pytest
import tiny
from inference.test_engine import CFG, run, submitted

import gemma_jax as gj
from gemma_jax.inference.engine import Engine
from gemma_jax.inference.prefill import PromptRow
from gemma_jax.inference.prefix_cache import PrefixCache
from gemma_jax.inference.requests import Request


@pytest.fixture(scope="module", params=[{}, dict(cache_dtype="int8")], ids=["plain", "int8"])
def model(request):
    return tiny.model(CFG, "unrolled", **request.param)


def answer(engine, ids, **options):
    ticket, heard = submitted(engine, Request(prompt=gj.Prompt(ids), max_new_tokens=8, **options))
    run(engine)
    return ticket.cached_tokens, heard.ids, heard.log_probs


def test_with_is_without_bit_for_bit(model):
    shared = tiny.tokens(CFG, 1, 40, seed=1)[0].tolist()  # windows of 8: rings have gone round
    ends = [tiny.tokens(CFG, 1, n, seed=n)[0].tolist() for n in (5, 9, 1)]
    kept = Engine(model, slots=2, context=64, chunk=16, prefix_bytes=10**7)
    none = Engine(model, slots=2, context=64, chunk=16)
    cached = []
    for end in [*ends, ends[0]]:
        n, *text = answer(kept, shared + end)
        assert text == list(answer(none, shared + end)[1:])
        cached.append(n)
    assert cached == [0, 32, 32, 32]
    other = [*shared[:20], (shared[20] + 1) % 90, *shared[21:]]  # another token in the second chunk
    n, *text = answer(kept, other)
    assert n == 16 and text == list(answer(none, other)[1:])
    assert answer(kept, shared + ends[0], reuse=False)[0] == 0
    assert kept.stats()["cached_tokens"] == 3 * 32 + 16
    # A prompt whose last chunk is full reads nothing at all.
    assert [answer(kept, shared[:33])[0] for _ in range(2)] == [32, 32]


def test_nothing_compiles_for_what_is_kept(model, compilations):
    engine = Engine(model, slots=2, context=64, chunk=16, prefix_bytes=10**7)
    engine.warm_up()
    assert compilations  # so they are heard
    compilations.clear()
    ids = tiny.tokens(CFG, 1, 40)[0].tolist()
    assert [answer(engine, ids)[0] for _ in range(2)] == [0, 32]
    assert not compilations


def test_the_least_used_goes_and_beginnings_stay():
    row = PromptRow.of(list(range(12)), 0, None, ())
    parts = [slice(0, 4), slice(4, 8), slice(8, 12)]
    bytes_of_one = [np.zeros(25, np.float32)]
    cache = PrefixCache(350)
    chain = []
    for part in parts:
        chain.append(cache.put(row, part, None, chain, bytes_of_one))
    assert cache.find(row, parts, None) == chain and cache.nbytes == 300
    assert cache.find(row, parts, "adapter") == []
    other = PromptRow.of([*range(4), 9, 9, 9, 9], 0, None, ())
    new = cache.put(other, parts[1], None, chain[:1], bytes_of_one)
    assert cache.find(row, parts, None) == chain[:2]  # its end had to go
    assert cache.find(other, parts[:2], None) == [chain[0], new]
    assert cache.put(row, parts[2], None, chain[:2], [np.zeros(100)]) is None and len(cache) == 3
