"""Hugging Face folders: config both ways, names of tensors, files."""
