"""gemma-jax's audio tower of Gemma 3n. Variants: the dtype of the arithmetic."""

import resource
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from protocol import serve
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gemma_checkpoints.hf.audio_names import AUDIO, TOWER
from gemma_checkpoints.name_table import expand
from gemma_jax.audio.encoder import AudioEncoder, frames_per_token
from gemma_jax.audio.streaming import AudioStream
from gemma_jax.presets import USM_CONFORMER
from gemma_jax.runtime import Runtime
from gemma_jax.weights.tree import flat_params


def load(folder: str) -> AudioEncoder:
    """The tower with transformers' weights."""
    make = partial(AudioEncoder, USM_CONFORMER, layout="unrolled")
    encoder = jax.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    rows = expand(AUDIO, {"audio.tower.blocks": USM_CONFORMER.num_layers})
    for path, param in flat_params(encoder).items():
        in_block = path[:2] == ("tower", "blocks")
        if in_block:
            _, _, group, place, *rest = path
            layer = encoder.tower.layer_groups[group].layer_index(place, 0)
            path = ("tower", "blocks", layer, *rest)
        row = rows[".".join(map(str, ("audio", *path)))]
        # Opened anew: what was read of the file would count for this process while it is open.
        with safe_open(Path(folder, "model.safetensors"), framework="numpy") as stored:
            array = stored.get_tensor(row.theirs.removeprefix(TOWER))
        if row.parsed is not None:
            shape = param.shape[in_block:]
            array = row.parsed(array, dict(zip(param.dims, shape, strict=True)))
        param.set_value(jnp.asarray(array[None] if in_block else array))
    return encoder


@partial(jax.jit, static_argnames="runtime")
def encode(encoder: AudioEncoder, mel: jax.Array, runtime: Runtime) -> jax.Array:
    """The features of whole clips."""
    return encoder(mel, None, runtime)[0]


class Tower:
    def __init__(self, variant: str, paths: dict[str, str]):
        self._encoder, self._output = load(paths["weights"]), paths["output"]
        self._mel = load_file(paths["inputs"])["mel"]
        self._runtime = Runtime(dtype=jnp.dtype(variant))
        self.facts = {"jax": jax.__version__, "dtype": variant}

    def __getattr__(self, name: str):
        """`stream_4`: with four tokens per step."""
        kind, _, count = name.partition("_")
        if kind != "stream":
            raise AttributeError(name)
        return partial(self._stream, int(count))

    def encode(self) -> tuple[float, int]:
        """Seconds for the clip, and the peak memory of this process in bytes."""
        start = time.perf_counter()
        features = jax.block_until_ready(encode(self._encoder, self._mel, self._runtime))
        return self._done(time.perf_counter() - start, features)

    def _stream(self, tokens_per_step: int) -> tuple[float, int]:
        """Seconds of work for the clip as its frames come, and the peak memory."""
        stream = AudioStream(self._encoder, self._runtime, tokens_per_step=tokens_per_step)
        frames = self._mel[0]
        step = frames_per_token(USM_CONFORMER)
        start = time.perf_counter()
        tokens = [stream.push_mel(frames[i : i + step]) for i in range(0, len(frames), step)]
        features = np.concatenate([*tokens, stream.finish()])[None]
        return self._done(time.perf_counter() - start, features)

    def _done(self, seconds: float, features: jax.Array | np.ndarray) -> tuple[float, int]:
        save_file({"features": np.asarray(features, np.float32)}, self._output)
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


serve(Tower)
