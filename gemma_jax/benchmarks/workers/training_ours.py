"""gemma-jax: steps of training on rows of one length, with AdamW.

Variants: `full`, all parameters; `lora`, adapters of rank 16 beside attention and feed-forward.
"""

import time

import jax
import numpy as np
from protocol import serve

import gemma_jax as gj


class Training:
    def __init__(self, variant: str, paths: dict[str, str]):
        model = gj.load_model(paths["model"], dtype="float32", weights="float32")
        parts = gj.lora(model, gj.Lora(rank=16, alpha=16)) if variant == "lora" else None
        trained, self._frozen, join = parts or gj.trainable(model)
        settings = gj.OptimizerSettings(rate=1e-5, clip=1.0)
        init, step = gj.make_step(gj.next_token, gj.make_optimizer(settings, model, 100), join)
        self._state = init(trained, jax.random.key(0))
        self.facts = {
            "jax": jax.__version__,
            "trained": sum(array.size for array in trained.values()),
        }
        del model, parts, trained  # a state has copies of its own
        if variant == "full":
            self._frozen = {}
        self._step = jax.jit(step, donate_argnums=0)

    def step(self, ids):
        """Seconds of a step on these rows, and its loss."""
        start = time.perf_counter()
        self._state, metrics = self._step(self._state, self._frozen, np.array(ids, np.int32))
        loss = float(metrics["loss"])
        jax.block_until_ready(self._state)
        return time.perf_counter() - start, loss


serve(Training)
