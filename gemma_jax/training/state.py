"""What a run of training is at one moment."""

from dataclasses import dataclass
from typing import Any

import jax
import optax

from gemma_jax.training.trainable import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Holds all that a run needs to go on: a pytree of arrays, to be saved as it is.

    Attributes:
      step: int32; updates so far.
      trained: Path -> array; see `trainable`.
      moments: State of the optimizer.
      key: Of the run. A step draws from this and its number, so it stays what it is.
      data_position: Numbers that say how far the data have been read, in any form. Whoever reads
        them sets it, by `dataclasses.replace`; a step hands it on.

    Examples:
      >>> import gemma_jax as gj
      >>> import jax
      >>> import optax
      >>> trained, frozen, join = gj.trainable(gj.load_model("checkpoints/digits"))
      >>> init, step = gj.make_step(gj.next_token, optax.adam(1e-3), join)
      >>> state = init(trained, jax.random.key(0), data_position={"next_index": 7})
      >>> int(state.step), int(state.data_position["next_index"])
      (0, 7)
    """

    step: jax.Array
    trained: Params
    moments: optax.OptState
    key: jax.Array
    data_position: Any = None
