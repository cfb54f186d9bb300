"""Memory by storage: bytes of weights and where they lie, and the contexts that a budget leaves.

What shapes alone say: neither temporaries of a step nor what the program itself takes are counted.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

from gemma_jax.config import GemmaConfig
from gemma_jax.decoder.cache import cache_bytes
from gemma_jax.decoder.model import abstract_model
from gemma_jax.quantisation import bytes_by_param
from gemma_jax.storages import MADE_STORAGES, WeightStorage
from gemma_jax.weights.off_device import Place
from gemma_jax.weights.tree import ParamPath

TABLE: ParamPath = ("per_layer", "table")


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights in one storage.

    Attributes:
      table: Of Gemma 3n's per-layer table; 0 for models without one.
      rest: Of all else.
      table_off_device: Of the table on the host or on disk.
    """

    table: int
    rest: int
    table_off_device: int

    @property
    def total(self) -> int:
        """With the table on the device."""
        return self.table + self.rest

    def by_place(self, table: Place) -> dict[str, int]:
        """Place -> bytes there, for a table that lies in one of them."""
        if table == "device":
            return {"device": self.total}
        return {"device": self.rest, table: self.table_off_device}


def text_of(cfg: GemmaConfig) -> GemmaConfig:
    """The decoder alone, as `modalities=("text",)` loads it."""
    return replace(cfg, vision=None, audio=None, modality_vocabularies=())


def weights_by_storage(
    cfg: GemmaConfig, storages: Iterable[WeightStorage] = MADE_STORAGES
) -> dict[str, WeightBytes]:
    """Bytes of a model by storage of its matrices; vectors are bfloat16, or float32 as matrices.

    Left out are storages whose groups do not divide the inputs of the model's matrices.

    Examples:
      >>> from gemma_jax.presets import preset
      >>> sizes = weights_by_storage(text_of(preset("gemma3n-e4b")), ["int4"])["int4"]
      >>> [round(one / 1e9, 2) for one in (sizes.rest, sizes.table, sizes.table_off_device)]
      [2.8, 1.47, 4.7]
    """
    return dict(_weights_by_storage(cfg, tuple(storages)))


@cache
def _weights_by_storage(
    cfg: GemmaConfig, storages: tuple[WeightStorage, ...]
) -> dict[str, WeightBytes]:
    model, sizes = abstract_model(cfg), {}
    for storage in storages:
        bits = 32 if storage == "float32" else 16
        with suppress(ValueError):
            sizes[storage] = measured(cfg, bytes_by_param(model, storage, bits), bits)
    return sizes


def measured(
    cfg: GemmaConfig, sizes: Mapping[ParamPath, int], off_device_bits: int = 16
) -> WeightBytes:
    """Bytes of all parameters of a model with this config, the table apart.

    Args:
      off_device_bits: Of an entry of the table off the device: quantised weights make it bfloat16.
    """
    table, count = sizes.get(TABLE, 0), 0
    if (per_layer := cfg.per_layer) is not None:
        count = per_layer.vocab_size * per_layer.width * len(cfg.layers)
    return WeightBytes(table, sum(sizes.values()) - table, count * off_device_bits // 8)


def longest_context(cfg: GemmaConfig, free: int, cache_dtype: str) -> int:
    """Tokens of one text whose caches fit in so many bytes; 0 if none do.

    Examples:
      >>> from gemma_jax.presets import preset
      >>> longest_context(preset("gemma3-1b"), 50_000_000, "bfloat16")
      9391
    """
    low, high = 0, cfg.max_positions
    while low < high:
        middle = (low + high + 1) // 2
        fits = cache_bytes(cfg, 1, middle, cache_dtype) <= free
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
