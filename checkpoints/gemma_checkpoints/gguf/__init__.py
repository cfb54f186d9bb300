"""GGUF files: header, config, names, and the decoding of their blocks."""
