"""Gemma over HTTP, as clients of the OpenAI API expect it; texts in, texts out.

An engine writes tokens. This room reads requests (`fields`, `schema`, `messages`), asks the engine
(`generation`), and answers (`chat`, `completions`, ...) behind one gate (`gate`).
"""
