"""A tiny Gemma 3n, trained so that its slices are good models too."""
