"""Cross-entropy over a large vocabulary, head product included; logits exist in chunks."""

from gemma_kernels.cross_entropy.dispatch import IMPLEMENTATIONS, cross_entropy

__all__ = ["IMPLEMENTATIONS", "cross_entropy"]
