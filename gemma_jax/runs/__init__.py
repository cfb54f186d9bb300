"""Runs of training: from a config to a folder that survives whatever ends the process."""
