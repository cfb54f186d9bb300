"""Every letter in a name or an equation is one of the core, or is explained in its file."""

import ast
import re
from pathlib import Path

import pytest

from gemma_jax import dims

ROOT = Path(__file__).parent.parent
FOLDERS = ("gemma_jax", "kernels", "checkpoints/gemma_checkpoints")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
SUFFIX = re.compile(r"_*[a-z]\w*_([A-Z0-9]+)")  # of `q_BTNH`
EQUATION = re.compile(r"[A-Z]+(,[A-Z]+)+(->[A-Z]*)?")  # for einsum


def letters(tree: ast.Module) -> set[str]:
    """Capital letters in suffixes of names, and in equations."""
    found = set()
    for node in ast.walk(tree):
        name = getattr(node, {ast.Name: "id", ast.Attribute: "attr"}.get(type(node), "arg"), None)
        if isinstance(name, str) and (match := SUFFIX.fullmatch(name)):
            found |= set(match[1])
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(node.value) if EQUATION.fullmatch(node.value) else set()
    return {letter for letter in found if letter.isalpha()}


def legend(tree: ast.Module) -> dict[str, str]:
    """`Local letters: R low rank; ...` at the end of a file's docstring."""
    text = re.search(r"Local letters: (.+)", ast.get_docstring(tree) or "", re.DOTALL)
    if text is None:
        return {}
    entries = re.findall(r"(?:^|;)\s*([A-Z]) ([^;]+)", " ".join(text[1].split()))
    return {letter: meaning.strip(" .") for letter, meaning in entries}


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=names)
def test_every_letter_is_explained(path):
    tree = ast.parse(path.read_text("utf-8"))
    used, local = letters(tree), legend(tree)
    assert used - dims.CORE - local.keys() == set()
    assert local.keys() - used == set(), "explained, but not used"
    assert all(local.values())


def test_the_core_is_the_table():
    rows = re.findall(r"\| ([A-Z]) +\| (\S[^|]*)", dims.__doc__)
    assert {letter for letter, _ in rows} == dims.CORE and len(rows) == len(dims.CORE)


def test_what_the_check_reads():
    tree = ast.parse(
        '"""Some file.\n\nLocal letters: X tokens drafted\nor chosen; I stop ids.\n"""\n'
        "def f(a_BX, *, b_I1=None): return g(c.d_TQ, 'BT,RT->BR', 'no,equation')\n"
    )
    assert letters(tree) == set("BXITQR")
    assert legend(tree) == {"X": "tokens drafted or chosen", "I": "stop ids"}
