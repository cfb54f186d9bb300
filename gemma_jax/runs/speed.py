"""How fast a run is: tokens per second, and the share of the devices' peak that it uses."""

from typing import Any

import jax

from gemma_jax.decoder.batch import Batch
from gemma_jax.planning.hardware import peak_operations
from gemma_jax.planning.training_costs import TrainingCosts, spans_in, texts_in
from gemma_jax.training.objectives import TrainBatch
from gemma_jax.training.preference import PreferenceBatch
from gemma_jax.training.trainable import Trainable


class Speed:
    """Tells of each step what it did per second.

    Real tokens count, and no padding. `mfu` is the model FLOPs utilisation of PaLM (Chowdhery et
    al., 2022, appendix B): operations that the step cannot do without, over those that the devices
    could have done; there is none where the peak of a device is not known, as of CPUs.

    Args:
      parts: What is trained.
      passes: Passes over a batch in one step.
    """

    def __init__(self, parts: Trainable, passes: int = 1):
        self.costs, self.passes = TrainingCosts.of(parts), passes
        devices = jax.devices()
        peak = peak_operations(devices[0].device_kind)
        self.peak = None if peak is None else peak * len(devices)

    def __call__(self, item: Any, seconds: float) -> dict[str, float]:
        batch = item.rows if isinstance(item, PreferenceBatch) else item
        batch = batch if isinstance(batch, TrainBatch) else TrainBatch(batch)
        read = batch.batch if isinstance(batch.batch, Batch) else Batch(batch.batch)
        texts = texts_in(read) * jax.process_count()
        said = {"tokens_per_second": sum(texts) / seconds}
        if self.peak is not None:
            spans = spans_in(None if batch.media is None else batch.media.block_BT)
            done = self.passes * self.costs.operations(texts, spans)
            said["mfu"] = done / seconds / self.peak
        return said
