"""Whether a stored output head is the embedding once more, or a head of its own.

What is stored decides, not the config: a head that equals the embedding is tied, one that differs
is used. So do transformers (`PreTrainedModel.tie_weights` of 5.24) and, with `output.weight`,
llama.cpp (`src/models/gemma3.cpp`).
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from .source import TensorInfo

BLOCK = 1 << 22  # values that are compared at a time

Read = Callable[[str, slice], np.ndarray]


def is_tied(read: Read, tensors: Mapping[str, TensorInfo], embedding: str, head: str) -> bool:
    """Whether the tensor `head` is absent, or holds the values of the tensor `embedding`.

    Rows are read in blocks, up to the first that differs. A head of another shape or kind is
    another head: what is wrong with it comes out when it is held against the model.
    """
    if head not in tensors:
        return True
    first, second = tensors.get(embedding), tensors[head]
    if first is None or first.shape != second.shape or len(first.shape) != 2:
        return False
    if not all(jnp.issubdtype(info.dtype, jnp.floating) for info in (first, second)):
        return False
    num_rows, width = first.shape
    step = max(1, BLOCK // width)
    blocks = (slice(i, i + step) for i in range(0, num_rows, step))
    return all(_equal(read(embedding, rows), read(head, rows)) for rows in blocks)


def _equal(first: np.ndarray, second: np.ndarray) -> bool:
    return np.array_equal(first.astype(np.float32), second.astype(np.float32))
