"""Tells whether the source of a kernel still says what it said when its schedules were stored."""

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

_KERNELS = Path(__file__).parents[1]
# The files that a schedule of the TPU's compiler depends on.
ATTENTION = (
    "attention/tiles.py",
    "attention/tpu/backward.py",
    "attention/tpu/backward_kernels.py",
    "attention/tpu/forward.py",
    "attention/tpu/forward_kernels.py",
)
QUANTIZED = (
    "quantized_matmul/tpu.py",
    "quantized_matmul/tpu_factors.py",
    "quantized_matmul/tpu_sums.py",
    "quantized_matmul/tpu_widen.py",
)
DECODING = ("decode_attention/tpu.py", "decode_attention/tpu_blocks.py")


def source_hash(files: Iterable[str]) -> str:
    """Hashes what the code of files does: no comments, no docstrings, no imports, no layout.

    Args:
      files: Paths relative to the folder of `gemma_kernels`.

    Returns:
      Sixteen hexadecimal digits, equal on every Python version.
    """
    facts = [_facts(ast.parse((_KERNELS / name).read_text("utf-8"))) for name in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _facts(node):
    """The tree as tuples, without what is empty: versions of Python differ in that."""
    if isinstance(node, list):
        return tuple(_facts(item) for item in node if not _says_nothing(item))
    if not isinstance(node, ast.AST):
        return node
    fields = ((name, getattr(node, name, None)) for name in node._fields)
    kept = ((name, _facts(value)) for name, value in fields if value not in (None, []))
    return type(node).__name__, *kept


def _says_nothing(node) -> bool:
    """Whether a statement is a docstring, or an import: files may move."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return True
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
