"""How good a model is: log-probabilities of text, and models that judge."""
