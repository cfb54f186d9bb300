"""gemma-jax's MobileNetV5-300M. Variants: the dtype of the arithmetic."""

import resource
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from protocol import serve
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gemma_checkpoints.hf.mobilenet_names import mobilenet_rows
from gemma_jax.mobilenet_presets import MOBILENET_V5_300M
from gemma_jax.runtime import Runtime
from gemma_jax.vision.mobilenet import MobileNetEncoder
from gemma_jax.weights.tree import flat_params


def load(file: str) -> MobileNetEncoder:
    """The tower with timm's weights."""
    encoder = jax.eval_shape(lambda: MobileNetEncoder(MOBILENET_V5_300M, rngs=nnx.Rngs(0)))
    params = {".".join(map(str, path)): param for path, param in flat_params(encoder).items()}
    with safe_open(file, framework="numpy") as stored:
        for row in mobilenet_rows(MOBILENET_V5_300M, ours=""):
            param, array = params[row.ours], stored.get_tensor(row.theirs)
            if row.parsed is not None:
                array = row.parsed(array, dict(zip(param.dims, param.shape, strict=True)))
            param.set_value(jnp.asarray(array))
    return encoder


@partial(jax.jit, static_argnames="runtime")
def encode(encoder: MobileNetEncoder, pixels: jax.Array, runtime: Runtime) -> jax.Array:
    """The features as a map, as timm has them."""
    return encoder(pixels, runtime, frozenset({"vision.tower"}))[1]["vision.tower"]


class Tower:
    def __init__(self, variant: str, paths: dict[str, str]):
        self._encoder, self._output = load(paths["weights"]), paths["output"]
        self._pixels = jnp.asarray(load_file(paths["inputs"])["pixels"])
        self._runtime = Runtime(dtype=jnp.dtype(variant))
        self.facts = {"jax": jax.__version__, "dtype": variant}

    def encode(self) -> tuple[float, int]:
        """Seconds for one image, and the peak memory of this process in bytes."""
        start = time.perf_counter()
        features = jax.block_until_ready(encode(self._encoder, self._pixels, self._runtime))
        seconds = time.perf_counter() - start
        save_file({"features": np.asarray(features, np.float32)}, self._output)
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


serve(Tower)
