"""Experiments: each folder has a configuration, a run, and results that are stored."""
