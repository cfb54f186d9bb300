"""Architectures in small, held against each other over several seeds: `gemma-jax experiment`."""
