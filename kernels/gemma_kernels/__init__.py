"""Attention for Gemma-shaped models, usable without the models themselves."""
