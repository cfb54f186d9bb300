"""Generation: reading prompts, the compiled token loop, and the text that comes out."""
