"""Files and calls that fit a reader: what is larger is to be split where it changes subject."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(
    path
    for folder in ("gemma_jax", "kernels", "checkpoints", "tests")
    for path in (ROOT / folder).rglob("*.py")
)
LONG = ("presets", "kernels", "table")  # files with these words in their path may be longer


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_and_no_call_is_too_long(path):
    name, text = str(path.relative_to(ROOT)), path.read_text("utf-8")
    assert len(text.splitlines()) <= (600 if any(word in name for word in LONG) else 500)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name == "__call__":
            assert node.end_lineno - node.lineno < 40, f"line {node.lineno}"


def test_the_files_are_found():
    assert len(FILES) > 200


def test_names_of_test_files_are_unique():
    """pytest imports them by name alone, and refuses the second of two."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, times in names.items() if times > 1]
