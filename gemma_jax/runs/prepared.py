"""What a config names, made: model, adapters, data, objective, optimizer; then the run of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.generate import generate
from gemma_jax.loading import load_model, load_tokenizer
from gemma_jax.peft import save_adapter
from gemma_jax.runs.config import RunConfig, Samples
from gemma_jax.runs.folder import RunFolder
from gemma_jax.runs.parts import load_options, make_parts
from gemma_jax.runs.plot import plot_losses
from gemma_jax.runs.speed import Speed
from gemma_jax.runs.train import Beside, train
from gemma_jax.runs.watch import TensorBoard, Watcher
from gemma_jax.saving import save
from gemma_jax.text import Tokenizer
from gemma_jax.training.data.pipeline import Data, make_data
from gemma_jax.training.loop import SpikeGuard
from gemma_jax.training.objectives import TrainBatch
from gemma_jax.training.optimizers import make_optimizer
from gemma_jax.training.preference import PreferenceBatch
from gemma_jax.training.step import Objective
from gemma_jax.training.trainable import Trainable


@dataclass(frozen=True)
class Prepared:
    """A run that has all it needs and has not begun.

    Attributes:
      parts: What is trained, and what is not.
      data, held_out: Batches, as the objective reads them.
    """

    config: RunConfig
    tokenizer: Tokenizer
    model: Gemma
    parts: Trainable
    objective: Objective
    optimizer: optax.GradientTransformation
    steps: int
    data: "Grouped"
    held_out: "Grouped | None"

    @property
    def summary(self) -> str:
        """A line for whoever waits."""
        trained = sum(array.size for array in self.parts.trained.values())
        read = self.data.data.survey
        return (
            f"{trained:,} parameters are trained, for {self.steps:,} steps on {len(read.layout):,} "
            f"rows of {self.config.data.tokens_per_row} tokens"
        )

    def run(
        self, tables: Mapping[str, Any], *, resume: bool = False, watchers: Sequence[Watcher] = ()
    ) -> Path:
        """Trains, and saves what comes out; returns where that is.

        Args:
          tables: The config as plain tables, to be written down.
        """
        config = self.config
        out = Path(config.out)
        folder = out / ("model" if config.adapter is None else "adapter")
        model = train(
            self.parts,
            self.data,
            self.objective,
            optimizer=self.optimizer,
            steps=self.steps,
            seed=config.seed,
            micro_batches=config.micro_batches,
            folder=out,
            resume=resume,
            config=tables,
            beside=self._beside(watchers),
        )
        plot_losses(RunFolder(out, resume=True))
        if not folder.exists():
            model = getattr(model, "model", model)  # of a pair, the one that was trained
            if config.adapter is not None:
                save_adapter(model, folder, config.adapter, base=config.model)
            else:
                save(model, self.tokenizer, folder, format=config.save_as)
        return folder

    def _beside(self, watchers: Sequence[Watcher]) -> Beside:
        config = self.config
        guard = SpikeGuard(times=config.spike or float("inf"))
        if config.tensorboard and jax.process_index() == 0:
            watchers = [*watchers, TensorBoard(Path(config.out) / "tensorboard")]
        write = _writer(config.samples, self.tokenizer) if config.samples.prompts else None
        return Beside(
            every=config.every,
            held_out=() if self.held_out is None else self.held_out,
            write=write,
            watchers=watchers,
            guard=guard,
            rate=lambda step: float(config.optimizer.rate_at(step, steps=self.steps)),
            speed=Speed(self.parts),
        )


def prepare(config: RunConfig, *, progress: Callable[[int, int], None] | None = None) -> Prepared:
    """Loads and makes all that a config names.

    Args:
      progress: Called with bytes of weights read so far, and in total.

    Raises:
      ValueError: A part that cannot be had, or parts that do not fit together.
    """
    if config.adapter is None and config.save_as == "hf" and jax.process_count() > 1:
        raise ValueError(
            "a folder of Hugging Face is written by one process, and several train this model: say "
            'save_as = "orbax", and convert that'
        )
    tokenizer = load_tokenizer(config.model)
    options = load_options(config)
    model = load_model(config.model, options, progress=progress)
    parts, objective, model = make_parts(
        config, model, lambda: load_model(str(config.reference), options)
    )
    data = _grouped(config, tokenizer, model, config.data)
    held_out = config.held_out and _grouped(config, tokenizer, model, config.held_out)
    steps = _steps(config, data)
    optimizer = make_optimizer(config.optimizer, model, steps)
    return Prepared(config, tokenizer, model, parts, objective, optimizer, steps, data, held_out)


def _steps(config: RunConfig, data: "Grouped") -> int:
    """What the config says, or the data have."""
    if config.data.epochs is None:
        if config.steps is None:
            raise ValueError("say how long to train: steps = N, or data.epochs = N")
        return config.steps
    if config.steps is not None and config.steps > len(data):
        raise ValueError(
            f"steps={config.steps}, but {config.data.epochs} epochs end after {len(data)}: leave "
            "out data.epochs to read the data as often as it takes, or leave out steps"
        )
    return config.steps or len(data)


def _grouped(config: RunConfig, tokenizer: Tokenizer, model: Gemma, settings) -> "Grouped":
    data = make_data(
        settings,
        tokenizer,
        model.cfg,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    held_out = settings is not config.data
    return Grouped(data, 1 if held_out else config.micro_batches)


@dataclass(frozen=True)
class Grouped:
    """Batches of a run, so many at a time; of preferences as pairs."""

    data: Data
    size: int

    def __iter__(self) -> "_Groups":
        return _Groups(self)

    def __len__(self) -> int:
        return -(-len(self.data) // self.size)

    def batch_ids(self, number: int) -> list[tuple[str, ...]]:
        """`file:line` of every document of the rows of a step."""
        first = number * self.size
        numbers = range(first, min(first + self.size, len(self.data.batches)))
        return [row for n in numbers for row in self.data.batch_ids(n)]


class _Groups(Iterator[Any]):
    def __init__(self, grouped: Grouped):
        self._grouped, self._batches = grouped, iter(grouped.data)

    def __next__(self) -> TrainBatch | PreferenceBatch:
        size = self._grouped.size
        group = list(islice(self._batches, size))
        if not group:
            raise StopIteration
        if size == 1:
            batch = group[0]
        else:
            batch = _stacked(group + [_of_no_weight(group[0])] * (size - len(group)))
        return batch

    def get_state(self) -> dict[str, int]:
        return self._batches.get_state()

    def set_state(self, state: Mapping[str, int]) -> None:
        self._batches.set_state(dict(state))


def _of_no_weight(batch: TrainBatch | PreferenceBatch) -> TrainBatch | PreferenceBatch:
    """The batch with nothing in it that counts."""
    if isinstance(batch, PreferenceBatch):
        return replace(batch, rows=_of_no_weight(batch.rows))
    return replace(batch, weights_BT=0 * batch.weights_BT)


def _stacked(group: Sequence[TrainBatch | PreferenceBatch]) -> Any:
    """Batches of one shape, with an axis in front."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *group)


def _writer(samples: Samples, tokenizer: Tokenizer) -> Callable[[Gemma], dict[str, str]]:
    """What the model writes to the prompts, greedily."""

    def write(model: Any) -> dict[str, str]:
        model = getattr(model, "model", model)
        prompts: list[Any] = list(samples.prompts)
        if samples.chat:
            prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
        done = generate(model, tokenizer, prompts, max_new_tokens=samples.tokens)
        return {prompt: one.text for prompt, one in zip(samples.prompts, done)}

    return write
