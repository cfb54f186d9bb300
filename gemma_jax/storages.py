"""Lists what weights and caches can be stored as; arithmetic has a dtype of its own.

Commands offer these names, so that nothing heavy is imported here.
"""

from collections.abc import Mapping
from typing import Literal, get_args

WeightStorage = Literal[
    "float32",
    "bfloat16",
    "int8",
    "int8:32",
    "int8:64",
    "int8:128",
    "int4",
    "int4:32",
    "int4:64",
    "int4:128",
    "int4:channel",
    "stored",
    "auto",
]
CacheStorage = Literal["float32", "bfloat16", "int8"]
Activations = Literal["float", "int8"]
StorageRules = Mapping[str, WeightStorage]  # pattern of names -> storage; the first that fits

WEIGHT_STORAGES: tuple[WeightStorage, ...] = get_args(WeightStorage)
CACHE_STORAGES: tuple[CacheStorage, ...] = get_args(CacheStorage)
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
# What a storage keeps of a file as it is, and what it makes of any model.
STORED: WeightStorage = "stored"
AUTO: WeightStorage = "auto"  # stored, on a CPU and where a file has quantised blocks
MADE_STORAGES = tuple(name for name in WEIGHT_STORAGES if name not in (STORED, AUTO))
BLOCK_STORAGES = ("q4_0", "q8_0")  # blocks of 32 in GGUF files: training rounds to them, too


def storage_bits(storage: WeightStorage) -> int:
    """Bits of an entry, scales apart.

    >>> storage_bits("int4:64"), storage_bits("bfloat16")
    (4, 16)
    """
    return int("".join(filter(str.isdigit, storage.partition(":")[0])))


def is_narrower(storage: WeightStorage, dtype: str) -> bool:
    """Whether entries have fewer bits than those of the arithmetic, `"float32"` or `"bfloat16"`."""
    return storage_bits(storage) < (32 if dtype == "float32" else 16)


def storage_group(storage: str) -> int | None:
    """Neighbouring inputs that share a scale in a storage of whole numbers; `None`: all of them.

    >>> storage_group("int8"), storage_group("int4"), storage_group("int4:128")
    (None, 32, 128)
    """
    kind, _, group = storage.partition(":")
    if group == "channel" or (kind == "int8" and not group):
        return None
    return int(group or 32)


def is_quantised(storage: str) -> bool:
    """Whether a storage is one of whole numbers and scales."""
    return storage.startswith("int") or storage in BLOCK_STORAGES


def one_of(names: tuple[str, ...]) -> str:
    """Says what to choose from: `'a', 'b' or 'c'`."""
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last
