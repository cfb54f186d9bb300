"""Text that every Python brings along: its language reference and its library's docstrings.

It differs a little from one version of Python to the next; `digest` tells texts apart.
"""

import ast
import hashlib
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

PARAGRAPH = "\n\n"


def documents() -> dict[str, str]:
    """Name -> text: the topics of `help()`, and the docstrings of each module of one file."""
    texts = {f"topic {name}": text for name, text in topics.items()}
    for file in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        texts[f"module {file.stem}"] = PARAGRAPH.join(_docstrings(file))
    return {name: texts[name].strip() for name in sorted(texts) if texts[name].strip()}


def split(texts: dict[str, str], every: int = 10) -> tuple[list[str], list[str]]:
    """Documents to train on, and every tenth one, which is held out.

    The reference repeats whole sections under several topics: a paragraph stays where it comes
    first, and what is held out comes before everything else.
    """
    names, seen = list(texts), set()
    held_out = [_unseen(texts[name], seen) for name in names[::every]]
    kept = [_unseen(texts[name], seen) for i, name in enumerate(names) if i % every]
    return [text for text in kept if text], [text for text in held_out if text]


def digest(texts: dict[str, str]) -> str:
    """Beginning of the SHA-256 of all documents."""
    return hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()[:16]


def _docstrings(file: Path) -> list[str]:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = ast.walk(ast.parse(file.read_bytes()))
    return [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def _unseen(text: str, seen: set[str]) -> str:
    """Without the paragraphs in `seen`, which takes up the others."""
    new = [p for p in dict.fromkeys(text.split(PARAGRAPH)) if p not in seen]
    seen.update(new)
    return PARAGRAPH.join(new)
