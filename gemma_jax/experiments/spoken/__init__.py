"""The smallest Gemma 3n that hears and sees: spoken digits written down, and pictures of digits."""
