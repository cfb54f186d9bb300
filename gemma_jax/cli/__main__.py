from gemma_jax.cli import main

main()
