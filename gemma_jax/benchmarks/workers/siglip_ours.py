"""gemma-jax's SigLIP tower and projector. Variants: the dtype of the arithmetic.

Local letters: I images.
"""

import resource
import time

import jax
import numpy as np
from protocol import serve
from safetensors.numpy import load_file, save_file

from gemma_jax.loading import load_model
from gemma_jax.multimodal.encode import encode_images


class Tower:
    def __init__(self, variant: str, paths: dict[str, str]):
        self._model = load_model(paths["weights"], dtype=variant)
        self._pixels, self._output = load_file(paths["inputs"])["pixels"], paths["output"]
        self.facts = {"jax": jax.__version__, "dtype": variant}

    def encode(self) -> tuple[float, int]:
        """Seconds for one image, and the peak memory of this process in bytes."""
        start = time.perf_counter()
        soft_ITD, captured = encode_images(self._model, self._pixels, capture=("vision.tower",))
        jax.block_until_ready(soft_ITD)
        seconds = time.perf_counter() - start
        results = {"tower": captured["vision.tower"], "soft": soft_ITD}
        save_file({name: np.asarray(a, np.float32) for name, a in results.items()}, self._output)
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


serve(Tower)
