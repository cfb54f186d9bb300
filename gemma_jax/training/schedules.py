"""How the learning rate of a run changes from step to step."""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

Schedule = Literal["constant", "linear", "cosine"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cosine")


def scheduled_rate(
    step: jax.typing.ArrayLike,
    *,
    steps: int,
    peak: float,
    schedule: Schedule = "constant",
    warmup: int = 0,
    final_share: float = 0.0,
) -> jax.Array:
    """Computes the rate of one step, a float32 scalar.

    The first step of a warm-up has `peak / warmup` and its last has `peak`. Warm-ups of optax and
    transformers begin with a rate of 0, so that the first step only fills Adam's moments. From
    there the rate falls, to `final_share * peak` at the step after the last one: no step that is
    taken has the rate 0 either.

    Args:
      step: How many came before it.
      steps: Of the run.
    """
    step, top = jnp.asarray(step, jnp.float32), max(warmup - 1, 0)
    passed = jnp.clip((step - top) / max(steps - top, 1), 0, 1)
    left = {
        "constant": jnp.ones_like(passed),
        "linear": 1 - passed,
        "cosine": (1 + jnp.cos(jnp.pi * passed)) / 2,
    }[schedule]
    share = left if schedule == "constant" else final_share + (1 - final_share) * left
    rising = (step + 1) / max(warmup, 1)
    return peak * jnp.where(step < top, rising, share)


def listed_rate(step: jax.typing.ArrayLike, rates: Sequence[float]) -> jax.Array:
    """Takes the rate of one step out of a list; steps beyond it have the last."""
    return jnp.asarray(rates, jnp.float32)[jnp.minimum(step, len(rates) - 1)]
