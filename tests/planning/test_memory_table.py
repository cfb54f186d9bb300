"""The table of what fits in how many gigabytes."""

from test_imports import ROOT

from gemma_jax.decoder.cache import cache_bytes
from gemma_jax.planning import memory_table as table
from gemma_jax.planning.memory import longest_context, text_of, weights_by_storage
from gemma_jax.presets import preset


def test_the_stored_table_is_what_the_code_says():
    stored = (ROOT / "docs" / "hardware.md").read_text("utf-8")
    assert table.with_table(stored) == stored, "run python -m gemma_jax.planning.memory_table FILE"


def test_the_longest_context_is_the_longest_that_fits():
    cfg = preset("gemma3-1b")
    for free in (0, 30_000_000, 10**12):
        found = longest_context(cfg, free, "int8")
        assert cache_bytes(cfg, 1, found, "int8") <= free
        if found < cfg.max_positions:
            assert cache_bytes(cfg, 1, found + 1, "int8") > free


def test_a_table_on_disk_leaves_the_rest():
    cfg = text_of(preset("gemma3n-e4b"))
    sizes = weights_by_storage(cfg, ["bfloat16", "int4:64", "int4:128"])
    assert list(sizes) == ["bfloat16", "int4:64"]  # laurel's 64 inputs are half a group of 128
    entries = 262_144 * 35 * 256
    assert sizes["bfloat16"].by_place("device") == {"device": sizes["bfloat16"].total}
    assert sizes["int4:64"].by_place("disk") == {
        "device": sizes["int4:64"].total - entries * 9 // 16,
        "disk": 2 * entries,
    }
