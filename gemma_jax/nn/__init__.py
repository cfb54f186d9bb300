"""Building blocks of the decoder: one idea per file."""
