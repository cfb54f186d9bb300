"""Gemma 3 270M, which continues texts, learns to answer in a chat."""
