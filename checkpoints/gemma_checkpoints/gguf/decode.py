"""Blocks of a quantised GGUF tensor -> float32.

The `gguf` package can decode every type, at 20 to 150 million values per second. The types that
have a form in memory (`blocks.py`) are widened from it at 200 to 600 million, equal to the package
bit for bit.
"""

import numpy as np

from .blocks import FORMS, to_blocks

CHUNK = 1 << 18  # values decoded at a time, so that the temporaries stay in cache


def decode(blocks: np.ndarray, encoding: str, block_size: int) -> np.ndarray:
    """uint8 `[n, bytes per block]` -> float32 `[n, block_size]`."""
    out = np.empty((len(blocks), block_size), np.float32)
    step = CHUNK // block_size
    for i in range(0, len(blocks), step):
        chunk = blocks[i : i + step]
        if encoding in FORMS:
            to_blocks(chunk[:, None], encoding).values(out[i : i + step])
        else:
            out[i : i + step] = _by_package(chunk, encoding)
    return out


def _by_package(blocks: np.ndarray, encoding: str) -> np.ndarray:
    import gguf

    return gguf.dequantize(blocks, gguf.GGMLQuantizationType[encoding])
