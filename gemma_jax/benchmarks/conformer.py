"""The real audio tower of Gemma 3n beside transformers on 30 seconds of sound, in one run, on CPU.

    python -m gemma_jax.benchmarks.conformer --torch-python torch-env/bin/python --output FILE.json

Random weights, made once by the torch side, and the mel frames of a tone that rises through noise.
Says how far the features of each are from transformers', seconds for the clip, and the peak memory
of each process. The processes take turns and share the same cores.

In the same turns the clip goes through `AudioStream`, with so many soft tokens per step: all of the
work for it in seconds, of which there are 30 for it.
"""

import numpy as np

from gemma_jax.audio.mel import log_mel
from gemma_jax.benchmarks.towers import Comparison, main

TORCH, OURS = "conformer_torch.py", "conformer_ours.py"
SECONDS, RATE = 30, 16_000


def mel_frames() -> np.ndarray:
    """`[1, T, M]`: of what the model hears at once at most."""
    times = np.arange(SECONDS * RATE) / RATE
    tone = 0.3 * np.sin(2 * np.pi * (100 + 50 * times) * times)
    noise = np.random.default_rng(0).normal(0, 0.05, len(times))
    return log_mel((tone + noise).astype(np.float32))[None]


CONFORMER = Comparison(
    module="gemma_jax.benchmarks.conformer",
    needs="transformers",
    torch=TORCH,
    ours=OURS,
    rivals={
        "transformers float32": (TORCH, "float32"),
        "gemma-jax float32": (OURS, "float32"),
    },
    exact=("transformers float64", TORCH, "float64"),
    stands_in="transformers float32",
    inputs={"mel": mel_frames()},
    further={"gemma-jax float32": [f"stream_{n}" for n in (1, 4, 8)]},
)

if __name__ == "__main__":
    main(CONFORMER)
