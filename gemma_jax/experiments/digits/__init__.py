"""The smallest Gemma 3 that sees: handwritten digits, and questions about them."""
