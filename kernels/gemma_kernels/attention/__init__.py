"""Attention under Gemma's masks: causal, sliding-window, padded; grouped queries; soft cap."""

from gemma_kernels.attention.dispatch import IMPLEMENTATIONS, attention
from gemma_kernels.attention.mask import (
    Mask,
    causal_interval,
    first_of_document,
    last_of_block,
    two_sided_interval,
)
from gemma_kernels.attention.reference import attention_weights
from gemma_kernels.attention.spec import AttentionSpec

__all__ = [
    "IMPLEMENTATIONS",
    "AttentionSpec",
    "Mask",
    "attention",
    "attention_weights",
    "causal_interval",
    "first_of_document",
    "last_of_block",
    "two_sided_interval",
]
