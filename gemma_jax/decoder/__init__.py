"""The decoder: blocks, caches, attention, and one forward pass."""
