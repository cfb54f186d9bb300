"""The real MobileNetV5 of Gemma 3n (300M, 768 pixels) beside timm, in one run, on the CPU.

    python -m gemma_jax.benchmarks.mobilenet --torch-python torch-env/bin/python --output FILE.json

Random weights, made once by the torch side, and one image of noise. Says how far the features of
each are from timm's in float64 (`--exact`), seconds per image, and the peak memory of each process.
The processes take turns and share the same cores.
"""

import numpy as np

from gemma_jax.benchmarks.towers import Comparison, main

TORCH, OURS = "mobilenet_torch.py", "mobilenet_ours.py"
MOBILENET = Comparison(
    module="gemma_jax.benchmarks.mobilenet",
    needs="timm",
    torch=TORCH,
    ours=OURS,
    rivals={
        "timm float32": (TORCH, "float32"),
        "timm float32, channels last": (TORCH, "channels_last"),
        "gemma-jax float32": (OURS, "float32"),
    },
    exact=("timm float64", TORCH, "float64"),
    stands_in="timm float32",
    inputs={"pixels": np.random.default_rng(0).uniform(size=(1, 3, 768, 768)).astype(np.float32)},
)

if __name__ == "__main__":
    main(MOBILENET)
