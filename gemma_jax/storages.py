"""Lists what weights and caches can be stored as; arithmetic has a dtype of its own.

Commands offer these names, so that nothing heavy is imported here.
"""

from typing import Literal, get_args

WeightStorage = Literal["float32", "bfloat16", "int8"]
CacheStorage = Literal["float32", "bfloat16", "int8"]

WEIGHT_STORAGES: tuple[WeightStorage, ...] = get_args(WeightStorage)
CACHE_STORAGES: tuple[CacheStorage, ...] = get_args(CacheStorage)
BITS = {"float32": 32, "bfloat16": 16, "int8": 8}  # of an entry, scales apart


def one_of(names: tuple[str, ...]) -> str:
    """Says what to choose from: `'a', 'b' or 'c'`."""
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last
