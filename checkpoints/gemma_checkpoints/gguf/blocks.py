"""Blocks of quantised GGUF tensors -> codes, scales and offsets, bit for bit.

Eight types have a form in memory. Layouts: `ggml-common.h`, arithmetic: `ggml-quants.c` of
ggml-org/ggml. The scales and minima of K types are products of a float16 and a small whole number:
float32 holds them exactly, float16 does not.
"""

from collections.abc import Callable, Mapping

import numpy as np

from ..blocks import FLOAT32, BlockForm, Blocks

FORMS: Mapping[str, BlockForm] = {
    "Q8_0": BlockForm(8, True, 32),
    "Q4_0": BlockForm(4, True, 32),
    "Q4_1": BlockForm(4, False, 32, has_offset=True),
    "Q5_0": BlockForm(8, True, 32),
    "Q5_1": BlockForm(8, True, 32, has_offset=True),
    "Q4_K": BlockForm(4, False, 32, FLOAT32, has_offset=True),
    "Q5_K": BlockForm(8, True, 32, FLOAT32, has_offset=True),
    "Q6_K": BlockForm(8, True, 16, FLOAT32),
}


def to_blocks(raw: np.ndarray, encoding: str) -> Blocks:
    """Bytes of whole rows, uint8 `[rows, blocks of a row, bytes of a block]`."""
    codes, *factors = _READERS[encoding](raw.reshape(-1, raw.shape[-1]))
    rows = len(raw)
    codes = codes.reshape(rows, -1, codes.shape[-1])
    return Blocks(FORMS[encoding], codes, *(one.reshape(rows, -1) for one in factors))


Arrays = tuple[np.ndarray, ...]  # codes, scales, and offsets if there are any


def _q8_0(blocks: np.ndarray) -> Arrays:
    """32 values: scale f16, then int8s."""
    return blocks[:, 2:].view(np.int8), _half(blocks[:, :2])


def _q4_0(blocks: np.ndarray) -> Arrays:
    """32 values: scale f16, nibbles (values 0-15 low, 16-31 high). Offset 8."""
    return blocks[:, 2:], _half(blocks[:, :2])


def _q4_1(blocks: np.ndarray) -> Arrays:
    """32 values: scale and minimum f16, nibbles."""
    return blocks[:, 4:], _half(blocks[:, :2]), _half(blocks[:, 2:4])


def _q5_0(blocks: np.ndarray) -> Arrays:
    """32 values: scale f16, fifth bits, nibbles. Offset 16."""
    return _signed(_five_bits(blocks[:, 2:6], blocks[:, 6:]), 16), _half(blocks[:, :2])


def _q5_1(blocks: np.ndarray) -> Arrays:
    """32 values: scale and minimum f16, fifth bits, nibbles."""
    codes = _five_bits(blocks[:, 4:8], blocks[:, 8:])
    return codes.view(np.int8), _half(blocks[:, :2]), _half(blocks[:, 2:4])


def _q4_k(blocks: np.ndarray) -> Arrays:
    """8 x 32 values: scale and minimum f16, a 6-bit pair of them per 32 values, nibbles (of 64
    values, 0-31 low, 32-63 high)."""
    nibbles = blocks[:, 16:].reshape(-1, 4, 2, 16)
    first, second = nibbles[:, :, 0], nibbles[:, :, 1]
    codes = np.empty_like(nibbles)
    codes[:, :, 0] = (first & 15) | (second << 4)
    codes[:, :, 1] = (first >> 4) | (second & 0xF0)
    return codes.reshape(-1, 16), *_k_factors(blocks)


def _q5_k(blocks: np.ndarray) -> Arrays:
    """8 x 32 values: as Q4_K, with a byte of fifth bits for the values that are 32 apart."""
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]
    codes |= (fifth & 1) << 4
    return codes.reshape(-1, 32).view(np.int8), *_k_factors(blocks)


def _q6_k(blocks: np.ndarray) -> Arrays:
    """16 x 16 values: nibbles, upper 2 bits, an int8 scale per 16 values, scale f16. Offset 32."""
    codes = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8)
    codes |= (upper & 3) << 4
    scales = blocks[:, 192:208].view(np.int8) * _half(blocks[:, 208:210]).astype(np.float32)
    return _signed(codes, 32).reshape(-1, 32), scales


_READERS: Mapping[str, Callable[[np.ndarray], Arrays]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _half(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.float16)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """uint8 `[n, groups, width]` -> `[n, groups, 2, width]`: low halves, then high halves."""
    out = np.empty((*data.shape[:2], 2, data.shape[2]), np.uint8)
    np.bitwise_and(data, 15, out=out[:, :, 0])
    np.right_shift(data, 4, out=out[:, :, 1])
    return out


def _five_bits(fifth: np.ndarray, nibbles: np.ndarray) -> np.ndarray:
    """Codes from 0 to 31, `[n, 32]`."""
    codes = _nibbles(nibbles.reshape(-1, 1, 16)).reshape(-1, 32)
    codes |= np.unpackbits(fifth, axis=1, bitorder="little") << 4
    return codes


def _k_factors(blocks: np.ndarray) -> Arrays:
    """Scales and offsets of the types that have 8 6-bit pairs of them in 12 bytes, `[n, 8]`."""
    scale, minimum = (_half(blocks[:, i : i + 2]).astype(np.float32) for i in (0, 2))
    a, b, c = np.split(blocks[:, 4:16], 3, axis=1)
    scales = np.hstack([a & 63, (c & 15) | ((a >> 2) & 48)])
    minima = np.hstack([b & 63, (c >> 4) | ((b >> 2) & 48)])
    return scales * scale, -(minima * minimum)


def _signed(codes: np.ndarray, offset: int) -> np.ndarray:
    """`codes - offset` as int8, in place: bytes wrap around."""
    codes -= np.uint8(offset)
    return codes.view(np.int8)
