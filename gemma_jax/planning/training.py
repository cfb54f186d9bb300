"""The step of training that a plan compiles: that of a run, with shapes in the place of arrays."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.model import Gemma
from gemma_jax.matformer.slicing import at
from gemma_jax.matformer.submodel import Slice
from gemma_jax.nn.layer_groups import Layout
from gemma_jax.planning import costs
from gemma_jax.planning.lowering import Work, placed_model
from gemma_jax.planning.training_costs import TrainingCosts, forward_operations
from gemma_jax.runtime import Runtime
from gemma_jax.sharding import Partition
from gemma_jax.training.model_pair import ModelPair
from gemma_jax.training.objectives import next_token
from gemma_jax.training.placing import batch_shardings, state_shardings
from gemma_jax.training.state import TrainState
from gemma_jax.training.step import Objective, make_step
from gemma_jax.training.trainable import Trainable, trainable


class Made(NamedTuple):
    """Attributes: `parts`, `objective`, `optimizer`: what `make_step` asks for, and an init."""

    parts: Trainable
    objective: Objective
    optimizer: optax.GradientTransformation


MakeOther = Callable[[GemmaConfig], Gemma]  # a second model, placed as the first is


def adam_on_all(model: Gemma, other: MakeOther) -> Made:
    """Every parameter, the next token, Adam."""
    return Made(trainable(model), next_token, optax.adam(1e-4))


def plain_text(cfg: GemmaConfig, rows: int, tokens: int) -> Any:
    """Whole rows of tokens, all of which count."""
    return jax.ShapeDtypeStruct((rows, tokens), jnp.int32)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Says what is trained, and how.

    Attributes:
      make: Of a model without arrays, and a function that makes a second one, what a step is of.
      batch: From a config, rows and tokens per row to the shapes of a batch.
      micro_batches: See `make_step`.
      models: Times that a batch goes through the model forward and back.
      slices: Models inside it that the batch goes through as well.
      own_reference: Whether the model without its adapters reads the batch, too.
      rows_per_row: Rows of a batch for each that `Work.batch` counts: 2 of pairs.
      runtime: How models compute, in what `Work` does not say.
      layout: Of their layers.
      stores: Whether narrow weights are stored; see `placed_model`.
      said: The same in words and numbers, for whoever reads the plan.
    """

    make: Callable[[Gemma, MakeOther], Made] = adam_on_all
    batch: Callable[[GemmaConfig, int, int], Any] = plain_text
    micro_batches: int = 1
    models: int = 1
    slices: Sequence[Slice] = ()
    own_reference: bool = False
    rows_per_row: int = 1
    runtime: Runtime = field(default_factory=lambda: Runtime(remat=True))
    layout: Layout = "scan"
    stores: bool = False
    said: Mapping[str, Any] = field(default_factory=dict)

    def model(self, cfg: GemmaConfig, work: Work, partition: Partition) -> Gemma:
        """A model as a run would load it."""
        return placed_model(cfg, work, partition, self.runtime, self.layout, self.stores)

    def operations(self, parts: Trainable, work: Work) -> float:
        """Of a step on all devices together, whose rows are whole texts."""
        lengths = self._lengths(work)
        once = TrainingCosts.of(parts).operations(lengths)
        total = self.models * once
        models = jax.eval_shape(parts.join, parts.trained, parts.frozen)
        for one in self.slices:
            part = forward_operations(at(models, one), lengths)
            total += once * part / forward_operations(models, lengths)
        if isinstance(models, ModelPair):
            total += forward_operations(models.other, lengths)
        elif self.own_reference:
            total += forward_operations(models, lengths)
        return total

    def score_operations(self, parts: Trainable, work: Work) -> float:
        """Of these, those of attention, without those of models beside the one that is trained."""
        return self.models * TrainingCosts.of(parts).score_operations(self._lengths(work))

    def _lengths(self, work: Work) -> list[int]:
        return [work.context] * (self.micro_batches * self.rows_per_row * work.batch)


@dataclass(frozen=True)
class Step:
    """A step of training, placed.

    Attributes:
      made: Its parts, placed on the mesh.
      state: Shapes and shardings of what it moves.
      batch: Of what it reads.
    """

    made: Made
    state: TrainState
    batch: Any
    micro_batches: int
    partition: Partition

    @classmethod
    def of(cls, cfg: GemmaConfig, work: Work, how: Training, partition: Partition) -> "Step":
        """The step of a model with this config."""
        model = how.model(cfg, work, partition)
        made = how.make(model, partial(how.model, work=work, partition=partition))
        init, _ = make_step(made.objective, made.optimizer, made.parts.join)
        key = jax.eval_shape(lambda: jax.random.key(0))
        state = jax.eval_shape(init, made.parts.trained, key)
        state = replace(state, trained=made.parts.trained)
        state = _placed(state, state_shardings(state, partition))
        batch = how.batch(cfg, work.batch * how.rows_per_row, work.context)
        stacked = int(how.micro_batches > 1)
        if stacked:
            batch = jax.tree.map(partial(_stacked, how.micro_batches), batch)
        batch = _placed(batch, batch_shardings(batch, partition, stacked=stacked))
        return cls(made, state, batch, how.micro_batches, partition)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on one device: of all weights, of those that are trained, and of moments."""
        trained = costs.local_bytes(self.state.trained)
        frozen = costs.local_bytes(self.made.parts.frozen)
        moments = costs.local_bytes(self.state.moments)
        return {"all": trained + frozen, "trained": trained, "moments": moments}

    def traced(self) -> jax.stages.Traced:
        """The program as a run compiles it, for the mesh of the partition."""
        made = self.made
        _, step = make_step(
            made.objective, made.optimizer, made.parts.join, micro_batches=self.micro_batches
        )
        outputs = (jax.tree.map(lambda a: a.sharding, self.state), None)
        program = jax.jit(step, donate_argnums=0, out_shardings=outputs)
        # The mesh in context tells kernels which chip they are for.
        with jax.sharding.use_abstract_mesh(self.partition.mesh.abstract_mesh):
            return program.trace(self.state, made.parts.frozen, self.batch)

    def lower(self) -> jax.stages.Lowered:
        """Traced and lowered."""
        traced = self.traced()
        with jax.sharding.use_abstract_mesh(self.partition.mesh.abstract_mesh):
            return traced.lower()


def _stacked(count: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, sharding: a.update(sharding=sharding), tree, shardings)
