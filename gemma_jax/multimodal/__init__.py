"""Prompts of several modalities: text with images becomes token ids and soft tokens."""
