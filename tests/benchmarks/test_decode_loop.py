"""The end-to-end bench, on a tiny model. What it measures is checked, how fast it is never."""

import json
import os
import subprocess
import sys

import pytest

from gemma_jax import preset


@pytest.fixture
def decode_loop(monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())  # it sets some for its workers
    from gemma_jax.benchmarks import decode_loop

    return decode_loop


@pytest.mark.nightly
def test_runs(tmp_path):
    output = tmp_path / "results" / "tiny.json"
    command = [
        sys.executable,
        "-m",
        "gemma_jax.benchmarks.decode_loop",
        "--tiny",
        "--output",
        str(output),
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(output.read_text())
    assert "--tiny" in found["command"] and "PATH" in found["command"]
    for layout in ("scan", "unrolled"):
        entry = found["models"]["tiny"][f"gemma-jax {layout}"]
        assert entry["copy_bytes_per_s"] > 0 and entry["facts"]["platform"] == "cpu"
        for batch in (1, 2):
            work = entry[f"decode, batch {batch}"]
            expected = work["tokens_per_s"] / work["roofline_tokens_per_s"]
            assert work["share_of_roofline"] == pytest.approx(expected)
        assert {"attention", "ffn"} <= set(entry["seconds_by_scope"])
        assert entry["prefill, 64 tokens"]["tokens_per_s"] > 0
    assert found["models"]["tiny"]["transformers"] == {"skipped": "no --torch-python given"}


def test_bytes_of_a_step(decode_loop):
    """By hand for 1B: 22 local layers of 512 slots, 4 global ones, one head of 256."""
    cfg = preset("gemma3-1b")
    assert decode_loop.step_bytes(cfg, 10, 1, 100) == 10 + 26 * 100 * 1024
    assert decode_loop.step_bytes(cfg, 10, 3, 8192) == 10 + 3 * (22 * 512 + 4 * 8192) * 1024
