"""Vectors of texts: EmbeddingGemma, and any other Gemma with such a head."""
