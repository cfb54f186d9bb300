"""Attention of a decoding step: few new tokens over ring caches and long full caches."""

from gemma_kernels.decode_attention.dispatch import IMPLEMENTATIONS, decode_attention
from gemma_kernels.decode_attention.spec import MOST_TOKENS

__all__ = ["IMPLEMENTATIONS", "MOST_TOKENS", "decode_attention"]
