"""Blocks of a quantised GGUF tensor -> float32.

The `gguf` package can decode every type, at 20 to 150 million values per second. The four types
that make up nearly all of a `Q4_K_M` file have a faster decoder here (200 to 600 million), equal
to it bit for bit. Layouts: `ggml-common.h`, arithmetic: `ggml-quants.c` of ggml-org/ggml.
"""

from collections.abc import Callable

import numpy as np

CHUNK = 1 << 18  # values decoded at a time, so that the temporaries stay in cache


def decode(blocks: np.ndarray, encoding: str, block_size: int) -> np.ndarray:
    """uint8 `[n, bytes per block]` -> float32 `[n, block_size]`."""
    out = np.empty((len(blocks), block_size), np.float32)
    step = CHUNK // block_size
    decoder = FAST.get(encoding) or _by_package(encoding)
    for i in range(0, len(blocks), step):
        decoder(blocks[i : i + step], out[i : i + step])
    return out


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """32 values: scale f16, then int8s."""
    np.multiply(blocks[:, 2:].view(np.int8), _half(blocks[:, :2]), out=out)


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    """32 values: scale f16, fifth bits, nibbles (values 0-15 low, 16-31 high). Offset 16."""
    codes = _nibbles(blocks[:, 6:].reshape(-1, 1, 16)).reshape(-1, 32)
    fifth = np.unpackbits(blocks[:, 2:6], axis=1, bitorder="little")
    codes |= fifth << 4
    np.multiply(_signed(codes, 16), _half(blocks[:, :2]), out=out)


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """8 x 32 values: scale and minimum f16, a 6-bit pair of them per 32 values, nibbles."""
    scale, minimum = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    a, b, c = np.split(blocks[:, 4:16], 3, axis=1)
    scales = np.hstack([a & 63, (c & 15) | ((a >> 2) & 48)]) * scale
    minima = np.hstack([b & 63, (c >> 4) | ((b >> 2) & 48)]) * minimum
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    out = out.reshape(codes.shape)
    np.multiply(codes, scales[..., None], out=out)
    out -= minima[..., None]


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    """16 x 16 values: nibbles, upper 2 bits, an int8 scale per 16 values, scale f16. Offset 32."""
    codes = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    codes |= (upper & 3) << 4
    scales = blocks[:, 192:208].view(np.int8) * _half(blocks[:, 208:210])
    codes = _signed(codes, 32).reshape(-1, 16, 16)
    np.multiply(codes, scales[..., None], out=out.reshape(codes.shape))


FAST: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "Q8_0": _q8_0,
    "Q5_0": _q5_0,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
}


def _by_package(encoding: str) -> Callable[[np.ndarray, np.ndarray], None]:
    import gguf

    kind = gguf.GGMLQuantizationType[encoding]

    def decoder(blocks, out):
        out[...] = gguf.dequantize(blocks, kind)

    return decoder


def _half(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """uint8 `[n, groups, width]` -> `[n, groups, 2, width]`: low halves, then high halves."""
    out = np.empty((*data.shape[:2], 2, data.shape[2]), np.uint8)
    np.bitwise_and(data, 15, out=out[:, :, 0])
    np.right_shift(data, 4, out=out[:, :, 1])
    return out


def _signed(codes: np.ndarray, offset: int) -> np.ndarray:
    """`codes - offset` as int8, in place: bytes wrap around."""
    codes -= np.uint8(offset)
    return codes.view(np.int8)
