"""What `/metrics` says of the engine, and under which names."""

import pytest

from gemma_jax.serving.metrics import OURS, Metrics

STATS = {
    "running": 3,
    "waiting": 2,
    "slots": 4,
    "prompt_tokens": 100,
    "cached_tokens": 60,
    "drafted_tokens": 8,
    "kept_tokens": 5,
}


@pytest.mark.parametrize("prefix", [OURS, "vllm:"])
def test_numbers_of_the_engine(prefix):
    text = Metrics("tiny", prefix, lambda: STATS).text()[0].decode()
    labels = '{engine="0",model_name="tiny"}'
    for name, value in {
        "num_requests_running": 3.0,
        "num_requests_waiting": 2.0,
        "kv_cache_usage_perc": 0.75,
        "prefix_cache_queries_total": 100.0,
        "prefix_cache_hits_total": 60.0,
        "spec_decode_num_draft_tokens_total": 8.0,
        "spec_decode_num_accepted_tokens_total": 5.0,
    }.items():
        assert f"\n{prefix}{name}{labels} {value}\n" in text, name
