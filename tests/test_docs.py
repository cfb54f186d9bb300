"""The documents say what is there: links, paths, Python names, commands and their options."""

import ast
import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import typer
from test_imports import ROOT

import gemma_checkpoints
import gemma_jax
from gemma_jax.cli.app import app

SKIPPED = {".git", "site", "build", "dist"}
DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part in SKIPPED or part.startswith(".") for part in path.relative_to(ROOT).parts)
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"\b(?:gemma_jax|kernels|checkpoints|tests|notebooks|docs)/[\w./-]*\.\w+")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MADE = ("NAME", "out.", "text.txt")  # placeholders in commands


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fenced(language: str) -> list[str]:
    return [
        code
        for path in DOCUMENTS
        for kind, code in FENCE.findall(path.read_text("utf-8"))
        if kind == language
    ]


def anchors(path: Path) -> set[str]:
    """Of the headings of a document, as GitHub and mkdocs spell them."""
    heads = re.findall(r"^#+ +(.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_links_lead_somewhere(path):
    for link in LINK.findall(path.read_text("utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_files_that_are_named_exist(path):
    named = {p for p in PATH.findall(path.read_text("utf-8")) if not any(m in p for m in MADE)}
    # A README may name files from its own folder on.
    missing = {p for p in named if not (ROOT / p).exists() and not (path.parent / p).exists()}
    assert not missing


def test_python_in_documents_names_what_there_is():
    packages = {"gj": gemma_jax, "gc": gemma_checkpoints}
    blocks = [code for code in fenced("python") if not code.startswith("%")]
    assert len(blocks) >= 5
    for code in blocks:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                package = packages.get(node.value.id)
                assert package is None or hasattr(package, node.attr), ast.unparse(node)


def test_reference_pages_name_what_there_is():
    pages = (ROOT / "docs" / "api").glob("*.md")
    entries = [
        line[4:]
        for page in pages
        for line in page.read_text("utf-8").splitlines()
        if line.startswith("::: ")
    ]
    assert len(entries) >= 40
    for entry in entries:
        pkgutil.resolve_name(entry)


def commands() -> list[list[str]]:
    """Every `gemma-jax ...` of a shell block, in words."""
    lines = "\n".join(fenced("bash")).replace("\\\n", " ").splitlines()
    found = [line.partition("gemma-jax ")[2] for line in lines if not line.startswith("gcloud")]
    return [shlex.split(rest.rstrip("'"), comments=True) for rest in found if rest]


def test_commands_in_documents_have_these_options():
    group = typer.main.get_command(app)
    everywhere = {"--multihost", "--coordinator", "--num-processes", "--process-id", "--debug"}
    assert len(commands()) >= 10
    for command, *words in commands():
        known = {option for param in group.commands[command].params for option in param.opts}
        used = {word for word in words if word.startswith("--")}
        assert used <= known | everywhere, f"gemma-jax {command}: {used - known}"


def test_every_command_is_in_the_table():
    table = (ROOT / "docs" / "cli.md").read_text("utf-8")
    for command in typer.main.get_command(app).commands:
        assert f"| `gemma-jax {command}" in table
