"""`python -m gemma_jax` is `gemma-jax`."""

from gemma_jax.cli import main

if __name__ == "__main__":
    main()
