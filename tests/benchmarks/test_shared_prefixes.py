"""Contexts that are read once beside every pair by itself."""

import tiny

from gemma_jax.benchmarks import shared_prefixes


def test_both_orders_agree():
    result = shared_prefixes.measure(tiny.model(tiny.gemma3(3), "unrolled"), 3, 40, 4, 1)
    assert result["pairs"] == 12 and result["largest_difference"] < shared_prefixes.ATOL
    assert result["speedup"] > 0 and len(result["seconds"]["naive"]) == 1
