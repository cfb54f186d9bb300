"""Benchmarks of whole models, side by side with rivals."""
