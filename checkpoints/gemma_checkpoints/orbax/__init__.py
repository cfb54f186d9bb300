"""Orbax folders of ours."""
