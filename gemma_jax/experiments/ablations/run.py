"""Trains every variant of an ablation with every seed, by the step and the loop of all training."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.forward import forward
from gemma_jax.decoder.model import Gemma
from gemma_jax.experiments.ablations.ablation import Ablation, Recipe
from gemma_jax.experiments.ablations.recall import KINDS
from gemma_jax.training.loop import LossError, SpikeGuard, steps
from gemma_jax.training.objectives import TrainBatch, next_token
from gemma_jax.training.optimizers import OptimizerSettings, make_optimizer
from gemma_jax.training.step import make_step
from gemma_jax.training.trainable import Params, trainable

HELD_OUT, HELD_OUT_ROWS = 1_000_000, 32  # a seed that none of training has, and rows
Tell = Callable[[str], None]
Row = dict[str, Any]


def run_ablation(
    ablation: Ablation, seeds: tuple[int, ...], *, tell: Tell = lambda line: None
) -> dict[str, Row]:
    """Name of a variant -> its parameters, and what each seed comes to on held-out rows."""
    rows: dict[str, Row] = {}
    for name, cfg in ablation.variants.items():
        recipe = ablation.recipe_of(name)
        train = _Training(cfg, recipe)
        found = [train(seed) for seed in seeds]
        rows[name] = {
            "parameters": train.parameters,
            "cached": cached_positions(cfg, recipe.task.length),
            "metrics": {metric: [one[metric] for one in found] for metric in found[0]},
        }
        tell(f"{name}: " + ", ".join(f"{k} {v}" for k, v in rows[name]["metrics"].items()))
    return rows


def cached_positions(cfg: GemmaConfig, length: int) -> int:
    """Positions whose keys and values a decoder keeps after so many tokens, over all layers."""
    return sum(min(spec.window or length, length) for spec in cfg.layers if spec.makes_keys)


class _Training:
    """A config and a recipe; programs are compiled once for all seeds."""

    def __init__(self, cfg: GemmaConfig, recipe: Recipe):
        model = Gemma(cfg, rngs=nnx.Rngs(0))
        settings = OptimizerSettings(
            rate=recipe.rate,
            schedule="cosine",
            warmup=max(1, recipe.steps // 10),
            weight_decay=0.01,
            clip=1.0,
        )
        self.cfg, self.recipe, self.parts = cfg, recipe, trainable(model)
        optimizer = make_optimizer(settings, model, steps=recipe.steps)
        self.init, step = make_step(next_token, optimizer, self.parts.join)
        self.step = jax.jit(step, donate_argnums=0)
        self.losses = jax.jit(_losses)
        self.parameters = sum(array.size for array in self.parts.trained.values())

    def __call__(self, seed: int) -> dict[str, float | None]:
        """Held-out nats per token by kind; `None` if the loss has ceased to be a number."""
        try:
            return self._measure(self._train(seed))
        except LossError:
            return dict.fromkeys(KINDS)

    def _train(self, seed: int) -> Params:
        trained = trainable(Gemma(self.cfg, rngs=nnx.Rngs(seed))).trained
        state = self.init(trained, jax.random.key(seed))
        guard = SpikeGuard(times=float("inf"))  # a spike is a result
        *_, last = steps(
            self.step,
            state,
            self.parts.frozen,
            _batches(self.recipe, seed),
            until=self.recipe.steps,
            guard=guard,
        )
        return last.state.trained

    def _measure(self, trained: Params) -> dict[str, float | None]:
        random = np.random.default_rng(HELD_OUT)
        tokens_BT, kinds_BT = self.recipe.task.draw(random, HELD_OUT_ROWS)
        losses_BT = np.asarray(self.losses(self.parts.join(trained, self.parts.frozen), tokens_BT))
        return {
            kind: round(float(losses_BT[kinds_BT[:, 1:] == number].mean()), 4)
            for kind, number in KINDS.items()
        }


def _batches(recipe: Recipe, seed: int) -> Iterator[TrainBatch]:
    for step in range(recipe.steps):
        random = np.random.default_rng((seed, step))
        tokens_BT, kinds_BT = recipe.task.draw(random, recipe.batch)
        yield TrainBatch(Batch(tokens_BT), weights_BT=recipe.task.weights(kinds_BT))


def _losses(model: Gemma, tokens_BT: jax.Array) -> jax.Array:
    """Nats per token, float32 `[B, T - 1]`."""
    log_p_BTV = jax.nn.log_softmax(forward(model, tokens_BT).logits[:, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
