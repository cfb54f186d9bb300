"""Tiles of the TPU kernels, by chip and shape: a table, and the row of it nearest to a call.

`gemma-jax bench kernels --tune` writes the table (`blocks.json`).
"""

import json
import math
from functools import cache
from pathlib import Path

from jax.experimental.pallas import tpu as pltpu

TABLE = Path(__file__).with_name("blocks.json")
VMEM_BYTES = 128 * 2**20  # where no chip is known (interpreter)
UNKNOWN = "v5e"  # the smallest, for a chip that is not in the table, or not known
_NAMES = {"v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "7x": "tpu7x"}  # by `pltpu.ChipVersion`


def this_chip() -> str:
    """The chip that a program is traced for, by its name in `compilers.tpu_targets.CHIPS`."""
    info = _info()
    return UNKNOWN if info is None else _NAMES.get(info.chip_version.value, UNKNOWN)


def vmem_bytes() -> int:
    """Of a core of that chip."""
    return getattr(_info(), "vmem_capacity_bytes", VMEM_BYTES)


def _info() -> pltpu.TpuInfo | None:
    try:
        return pltpu.get_tpu_info()
    except Exception:  # no TPU, and no mesh that names one: each version of JAX raises its own
        return None


def nearest(kind: str, chip: str, groups: int, width: int, window: int | None) -> dict:
    """Row of the table for a call.

    Args:
      kind: `"forward"` or `"backward"`.
      chip: A name out of `gemma_kernels.compilers.tpu_targets.CHIPS`.
      groups: Query heads per key/value head.
      width: Of a head.
      window: The promised window.
    """
    rows = [
        row
        for row in _rows()
        if (row["kind"], row["chip"]) == (kind, chip)
        and (row["window"] is None) == (window is None)
    ]

    def distance(row: dict) -> tuple[float, ...]:
        pairs = [(row["width"], width), (row["groups"], groups)]
        pairs += [] if window is None else [(row["window"], window)]
        return tuple(abs(math.log(a / b)) for a, b in pairs)

    return min(rows, key=distance)


@cache
def _rows() -> list[dict]:
    return json.loads(TABLE.read_text())["rows"]
