"""gemma-jax with random weights in bfloat16: the whole token loop inside one `jax.jit`.

Variants: the layout of the layers, `scan` or `unrolled`.
"""

import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from protocol import serve
from scopes import seconds_by_scope

from gemma_checkpoints.hf.config import config_from_hf
from gemma_jax import Gemma, Runtime
from gemma_jax.benchmarks import speed as benchmark
from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import abstract_model
from gemma_jax.inference.decode import advance
from gemma_jax.inference.session import Session
from gemma_jax.weights.tree import map_params

BFLOAT16 = jnp.dtype("bfloat16")
SCOPES = ("attention", "ffn", "head")


class Loop:
    def __init__(self, layout: str, paths: dict[str, str]):
        cfg = config_from_hf(json.loads(Path(paths["config"]).read_text()))
        self._model = random_model(cfg, layout)
        self.facts = {
            "jax": jax.__version__,
            "device": jax.local_devices()[0].device_kind,
            "platform": jax.default_backend(),
            "parameter_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self._model)),
            "attention": self._model.runtime.attention_impl,
        }

    def prefill(self, ids):
        seconds, tokens = benchmark.prefill(self._model, ids)
        return seconds, tokens[0]

    def decode(self, ids, new_tokens, room):
        seconds, tokens = benchmark.decode(self._model, ids, new_tokens, room=room)
        return seconds, tokens[0]

    def copy(self, size):
        """Seconds to read and write an array of so many bytes."""
        turns, array = 10, jnp.zeros(size // 2, BFLOAT16)
        run = jax.jit(
            lambda a: jax.lax.fori_loop(0, turns, lambda _, a: a + 1, a), donate_argnums=0
        )
        array = jax.block_until_ready(run(array))
        start = time.perf_counter()
        jax.block_until_ready(run(array))
        return (time.perf_counter() - start) / turns, None

    def profile(self, ids, new_tokens, room):
        """Seconds of a token loop under the profiler, and where they go: by named scope."""
        session = Session(self._model, len(ids), len(ids[0]) + room + 1)
        session.prefill(ids, max_new_tokens=room + 1)
        program = advance.lower(self._model, session._state, None, loop=True).compile()
        start = time.perf_counter()
        found = seconds_by_scope(program, lambda: session.decode(new_tokens + 1), SCOPES)
        return time.perf_counter() - start, found


def random_model(cfg: GemmaConfig, layout: str) -> Gemma:
    """One parameter after another, so that no more than the model itself is ever in memory."""

    def fill(param: nnx.Param) -> jax.Array:
        shape, inputs = param.get_value().shape, param.get_metadata().get("inputs", "")
        scale = math.prod(shape[len(shape) - len(inputs) :]) ** -0.5 if inputs else 0.0
        return _random(shape) * jnp.asarray(scale, BFLOAT16)

    model = abstract_model(cfg, layout=layout, runtime=Runtime(dtype=BFLOAT16))
    return map_params(model, fill)


def _random(shape: tuple[int, ...]) -> jax.Array:
    return jax.jit(lambda: jax.random.normal(jax.random.key(0, impl="rbg"), shape, BFLOAT16))()


serve(Loop)
