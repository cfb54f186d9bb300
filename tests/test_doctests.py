"""The examples in docstrings run, and every public function and class has one.

They use the two small models of the repository, and nothing else that would have to be fetched.
"""

import doctest
import importlib
from types import ModuleType

import pytest
from test_imports import FILES, ROOT

import gemma_checkpoints
import gemma_jax
from gemma_jax import matformer
from gemma_kernels import attention, cross_entropy, decode_attention

PACKAGES = (gemma_jax, matformer, gemma_checkpoints, attention, cross_entropy, decode_attention)
# Constants have no docstring. The helpers for masks are shown in use by `decode_attention`,
# searching for slices by notebook 03.
WITHOUT = {
    "gemma_jax": {"PRESETS"},
    "gemma_jax.matformer": {"PRESETS", "Point", "search", "sensitivity", "shares_cache"},
    "gemma_checkpoints": {"CATALOG"},
    "gemma_kernels.attention": {
        "IMPLEMENTATIONS",
        "attention_weights",
        "causal_interval",
        "first_of_document",
        "last_of_block",
        "two_sided_interval",
    },
    "gemma_kernels.cross_entropy": {"IMPLEMENTATIONS"},
    "gemma_kernels.decode_attention": {"IMPLEMENTATIONS", "MOST_TOKENS"},
}
WITH_EXAMPLES = [name for name, path in FILES.items() if ">>> " in path.read_text("utf-8")]


def public(package: ModuleType) -> set[str]:
    return set(package.__all__) - WITHOUT[package.__name__]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_has_an_example(package):
    texts = {name: getattr(package, name).__doc__ or "" for name in public(package)}
    assert not sorted(name for name, text in texts.items() if ">>> " not in text)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_first_lines_are_sentences(package):
    for name in public(package):
        first = getattr(package, name).__doc__.partition("\n")[0]
        assert first[0].isupper() and first.rstrip().endswith((".", ":")), f"{name}: {first}"


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples(module, monkeypatch):
    monkeypatch.chdir(ROOT)  # where `checkpoints/digits` is
    ran = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    assert ran.attempted and not ran.failed
