"""Moments of a run of training, in one Orbax folder per step: what `resume` goes on from.

A folder appears by being renamed when all in it is written, so whenever a run is killed, the last
whole one is there. Old ones are deleted after a new one has appeared: a full disk costs nothing.
Deleting begins by renaming, too: a folder that is half deleted when a run is killed counts no more.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma_jax.training.state import TrainState

from ..errors import CheckpointError

Json = Mapping[str, Any]
STATE, FACTS = "state", "facts"  # items of a folder
HELD_OUT = "held_out_loss"
DELETED = "deleted"  # where a step goes first


class TrainingStates:
    """Keeps the last moments of a run, and that with the lowest loss on held-out data.

    Args:
      folder: Made if it is not there.
      keep: So many of the last ones.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> import gemma_jax as gj
      >>> import jax
      >>> import numpy as np
      >>> import tempfile
      >>> state = gj.TrainState(np.int32(7), {("w",): np.ones(3)}, (), jax.random.key(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     states = gc.TrainingStates(folder)
      ...     states.save(state, {"next_row": 12})
      ...     again, facts = states.restore(state)
      >>> int(again.step), facts
      (7, {'next_row': 12})
    """

    def __init__(self, folder: str | Path, *, keep: int = 1):
        import orbax.checkpoint as ocp

        self.folder, self.keep = Path(folder).absolute(), keep
        options = ocp.CheckpointManagerOptions(
            cleanup_tmp_directories=True,
            # A step gives the arrays of the last one away (donation): they are written before it.
            enable_async_checkpointing=False,
            todelete_subdir=DELETED,
        )
        handlers = {STATE: ocp.StandardCheckpointHandler(), FACTS: ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)
        self._delete_for_good()

    @property
    def latest(self) -> int | None:
        """The last step that is kept."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step with the lowest loss on held-out data; `None` if that was never measured."""
        losses = {step: self.facts(step).get(HELD_OUT) for step in self._manager.all_steps()}
        measured = [(loss, step) for step, loss in losses.items() if loss is not None]
        return min(measured)[1] if measured else None

    def save(self, state: TrainState, facts: Json, held_out_loss: float | None = None) -> None:
        """Keeps a moment, unless its step is kept already.

        Args:
          facts: Whatever else a run has to know, as JSON.
          held_out_loss: By which the best one is told; in nats.

        Raises:
          CheckpointError: It cannot be written; those that were kept before still are.
        """
        import orbax.checkpoint as ocp

        step = int(state.step)
        if step in self._manager.all_steps():
            return
        measured = {} if held_out_loss is None else {HELD_OUT: float(held_out_loss)}
        items = {
            STATE: ocp.args.StandardSave(_arrays(state)),
            FACTS: ocp.args.JsonSave({**facts, **measured}),
        }
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise all kinds
            raise CheckpointError(
                self.folder,
                f"step {step} cannot be written: {_first_line(error)}; step "
                f"{self.latest} is kept: make room and resume",
            ) from error
        self._drop_old()

    def _drop_old(self) -> None:
        """Orbax's own rules forget, when a run is resumed, what older steps were measured at."""
        kept = [*sorted(self._manager.all_steps())[-self.keep :], self.best]
        for step in self._manager.all_steps():
            if step not in kept:
                self._manager.delete(step)
        self._delete_for_good()

    def _delete_for_good(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def restore(self, like: TrainState, step: int | None = None) -> tuple[TrainState, dict]:
        """A moment as it was, and its facts.

        Args:
          like: Has its shapes and dtypes, and says by its shardings where arrays go.
          step: Default: the last one.

        Raises:
          CheckpointError: There is none, or it is of another run: says what differs.
        """
        import orbax.checkpoint as ocp

        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(self.folder, "holds no step to resume from")
        wanted = _arrays(like)
        self._refuse_others(step, wanted)
        items = {
            STATE: ocp.args.StandardRestore(jax.tree.map(_abstract, wanted)),
            FACTS: ocp.args.JsonRestore(),
        }
        found = self._manager.restore(step, args=ocp.args.Composite(**items))
        leaves, tree = jax.tree.flatten(like)
        arrays = [_as(leaf, found[STATE][name]) for leaf, name in zip(leaves, wanted, strict=True)]
        return jax.tree.unflatten(tree, arrays), found[FACTS]

    def facts(self, step: int | None = None) -> dict:
        """The facts of a moment alone."""
        import orbax.checkpoint as ocp

        step = self.latest if step is None else step
        if step is None:
            raise CheckpointError(self.folder, "holds no step to resume from")
        args = ocp.args.Composite(**{FACTS: ocp.args.JsonRestore()})
        return self._manager.restore(step, args=args)[FACTS]

    def close(self) -> None:
        self._manager.close()

    def _refuse_others(self, step: int, wanted: Mapping[str, Any]) -> None:
        """Orbax casts to other dtypes without a word, and names one leaf of several that lack."""
        tree = self._manager.item_metadata(step)[STATE].tree
        kept = {name: _kind(entry) for name, entry in tree.items()}
        asked = {name: _kind(value) for name, value in wanted.items()}
        if kept == asked:
            return
        wrong = [
            f"{name}: kept {kept.get(name, 'nothing')}, now {asked.get(name, 'nothing')}"
            for name in sorted(kept.keys() | asked.keys())
            if kept.get(name) != asked.get(name)
        ]
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            self.folder, f"step {step} is of another run: {'; '.join(wrong[:3])}{more}"
        )


def _arrays(state: TrainState) -> dict[str, Any]:
    """The leaves of a state by names that stay the same between versions of JAX."""
    named = jax.tree_util.tree_leaves_with_path(state)
    return {
        ".".join(_word(key) for key in path): jax.random.key_data(leaf) if _is_key(leaf) else leaf
        for path, leaf in named
    }


def _as(leaf: Any, array: Any) -> Any:
    return (
        jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else array
    )


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _word(key: Any) -> str:
    name = getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))
    return ".".join(map(str, name)) if isinstance(name, tuple) else str(name)


def _abstract(value: Any) -> Any:
    if isinstance(value, jax.ShapeDtypeStruct):
        return value
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=getattr(value, "sharding", None))


def _kind(value: Any) -> str:
    return f"{np.dtype(value.dtype).name}{list(value.shape)}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
