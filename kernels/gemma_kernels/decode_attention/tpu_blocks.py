"""How the TPU kernel cuts a cache into items (see `tpu.py`)."""

from dataclasses import dataclass

from jax.experimental import pallas as pl

LANES = 128
STEP_BYTES = 8 * 2**20  # keys and values of a step: its latencies and upkeep vanish beside them
MOST_KEYS = 2048  # of a block


@dataclass(frozen=True)
class Blocks:
    """How a cache is cut.

    Attributes:
      keys: Slots of a block; a multiple of 128 that divides the cache's.
      rows: Rows of the batch in an item; more than one only if a cache is one block.
      items: Items of a grid step.
      cores: Cores among which the items are divided.
    """

    keys: int
    rows: int = 1
    items: int = 1
    cores: int = 1


def default_blocks(k_shape: tuple[int, ...], itemsize: int, cores: int = 1) -> Blocks:
    """Steps of up to `STEP_BYTES`, but two at least, so that copies hide behind work and it behind
    them; blocks of up to `MOST_KEYS`, so that a cache that is not full costs what it holds."""
    B, K, S, H = k_shape
    per_key = 2 * K * H * itemsize
    step = min(STEP_BYTES, max(B * S * per_key // (2 * cores), STEP_BYTES // 2))
    keys = S
    if S > MOST_KEYS or S * per_key > step // (cores if B == 1 else 1):
        most = min(max(step // (2 * per_key), 512), MOST_KEYS, S)
        keys = max(n for n in range(LANES, most + 1, LANES) if S % n == 0)
    room = max(step // (per_key * keys), 1)
    if keys == S:
        rows = max(n for n in range(1, min(room, B) + 1) if B % n == 0)
        return Blocks(keys=keys, rows=rows, cores=min(cores, B // rows))
    return Blocks(keys=keys, items=min(room, pl.cdiv(B * S // keys, cores)), cores=cores)
