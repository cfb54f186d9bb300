"""The real vision tower (So400m, 896 pixels) beside transformers, in one run, on the CPU.

    python -m gemma_jax.benchmarks.siglip --torch-python torch-env/bin/python --output RESULT.json

Random weights, made once by the torch side, and one image of noise. Says how far the soft tokens of
each are from transformers' in float64 (`--exact`, which is slow), seconds per image, and the peak
memory of each process. The processes take turns and share the same cores.
"""

import numpy as np

from gemma_jax.benchmarks.towers import Comparison, main

TORCH, OURS = "siglip_torch.py", "siglip_ours.py"
SIGLIP = Comparison(
    module="gemma_jax.benchmarks.siglip",
    needs="transformers",
    torch=TORCH,
    ours=OURS,
    rivals={
        "transformers float32, sdpa": (TORCH, "float32"),
        "transformers float32, eager": (TORCH, "eager"),
        "gemma-jax float32": (OURS, "float32"),
    },
    exact=("transformers float64", TORCH, "float64"),
    stands_in="transformers float32, eager",
    inputs={"pixels": np.random.default_rng(0).uniform(-1, 1, (1, 3, 896, 896)).astype(np.float32)},
)

if __name__ == "__main__":
    main(SIGLIP)
