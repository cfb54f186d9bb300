"""What editors and type checkers see of `gemma_jax` is what importing it gives."""

import ast
import importlib
from pathlib import Path

import gemma_jax


def names_for_editors() -> dict[str, str]:
    """Name -> module, from the imports under `if TYPE_CHECKING`."""
    tree = ast.parse(Path(gemma_jax.__file__).read_text("utf-8"))
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            # Without `as`, type checkers take an import for private.
            assert alias.asname == alias.name, f"write `{alias.name} as {alias.name}`"
            found[alias.name] = "." if node.level else node.module
    return found


def test_editors_see_the_lazy_names():
    lazy = gemma_jax._HOME_OF | dict.fromkeys(gemma_jax._MODULES, ".")
    assert names_for_editors() == lazy


def test_every_name_lies_where_it_is_said_to():
    for name, home in gemma_jax._HOME_OF.items():
        assert getattr(gemma_jax, name) is getattr(importlib.import_module(home), name)


def test_type_checkers_may_trust_the_packages():
    for package in ("gemma_jax", "gemma_kernels", "gemma_checkpoints"):
        (folder,) = importlib.import_module(package).__path__
        assert (Path(folder) / "py.typed").is_file(), package
