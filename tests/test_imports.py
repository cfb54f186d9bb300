"""Who may import whom: `gemma_kernels <- gemma_jax <- gemma_checkpoints <- command line`, and
inside `gemma_jax` down the floors. Imports are read as text: those inside functions and those for
annotations alone count too."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "gemma_jax": ROOT / "gemma_jax",
    "gemma_kernels": ROOT / "kernels" / "gemma_kernels",
    "gemma_checkpoints": ROOT / "checkpoints" / "gemma_checkpoints",
}
FILES = {
    ".".join([room, *path.relative_to(folder).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for room, folder in ROOMS.items()
    for path in sorted(folder.rglob("*.py"))
    if path.parent.name != "workers"  # scripts for the environments of rivals
}
# The one name that is not public in jax 0.10, the interpreter of Mosaic GPU.
PRIVATE = ("gemma_kernels.mosaic_gpu", "jax._src.pallas.mosaic_gpu.interpret")
# The parts of `gemma_jax`, lowest floor first; a part imports from its own floor and those below.
FLOORS = (
    ("dims", "config", "encoder_config", "text_embedding_config", "presets", "mobilenet_presets",
     "numerics", "sharding", "runtime", "compat", "distributed", "atomic_files", "storages",
     "platforms", "field_types", "remat"),
    ("text", "weights"),
    ("nn",),
    ("vision", "audio"),
    ("decoder",),
    ("multimodal", "matformer", "quantisation", "adapters",
     "resident_adapters"),
    ("placement",),
    ("inference", "training", "text_embedding"),
    ("planning", "evaluation", "serving", "viz"),
    ("loading", "saving", "runs", "peft", "experiments", "benchmarks", "harness"),
    ("cli", "__main__"),
)  # fmt: skip
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
# The parts where checkpoints come in.
DOORS = tuple(
    f"gemma_jax.{part}"
    for part in "loading saving peft runs experiments evaluation serving benchmarks cli".split()
)


def imported(module: str) -> set[str]:
    """Modules named in a file's imports.

    `from a import b` counts as `a.b`: whatever `b` is, it lies in `a`.
    """
    path, names = FILES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def file_of(name: str) -> str:
    """The file in which a dotted name lies: a module of ours, or nothing."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def forbidden(module: str) -> tuple[str, ...]:
    """Packages that a module of ours must not import."""
    rivals = ("jax._src", "torch", "tensorflow", "timm", "transformers")
    if inside(module, "gemma_kernels"):
        return (*rivals, "gemma_jax", "gemma_checkpoints", "flax")
    if inside(module, "gemma_jax.text"):
        return (*rivals, "gemma_checkpoints", "jax", "flax")
    if inside(module, "gemma_jax") and not inside(module, *DOORS):
        return (*rivals, "gemma_checkpoints")
    if inside(module, "gemma_checkpoints"):
        return (*rivals, "gemma_jax.cli", "gemma_jax.loading", "gemma_jax.saving")
    return rivals


def test_all_rooms_are_here():
    assert {name.partition(".")[0] for name in FILES} == set(ROOMS)
    assert len(FILES) > 50


@pytest.mark.parametrize("module", FILES)
def test_direction(module):
    wrong = {name for name in imported(module) if inside(name, *forbidden(module))}
    assert not {name for name in wrong if not (module == PRIVATE[0] and inside(name, PRIVATE[1]))}


def part_of(module: str) -> str:
    """`gemma_jax.nn.rope` is of the part `nn`; the lazy door `gemma_jax` itself is of none."""
    return module.split(".")[1] if module.startswith("gemma_jax.") else ""


@pytest.mark.parametrize("module", [name for name in FILES if part_of(name)])
def test_no_import_runs_up_the_floors(module):
    assert part_of(module) in FLOOR, "give it a floor"
    used = {file_of(name) for name in imported(module)} - {""}
    up = {name for name in used if part_of(name) and FLOOR[part_of(name)] > FLOOR[part_of(module)]}
    assert not up
    if "gemma_jax" in used:  # the door stands for everything
        assert inside(module, *DOORS)


def test_no_import_runs_in_a_circle():
    """What only uses what is done with, over and over, leaves nothing over."""
    left = {module: {file_of(name) for name in imported(module)} - {module} for module in FILES}
    while done := [module for module, used in left.items() if not used & left.keys()]:
        for module in done:
            del left[module]
    assert not left


def test_relative_imports_count(tmp_path, monkeypatch):
    file = tmp_path / "new.py"
    file.write_text("def f():\n    from ..decoder import model\n    from .rope import rope\n")
    monkeypatch.setitem(FILES, "gemma_jax.nn.new", file)
    assert imported("gemma_jax.nn.new") == {"gemma_jax.decoder.model", "gemma_jax.nn.rope.rope"}
    with pytest.raises(AssertionError):
        test_no_import_runs_up_the_floors("gemma_jax.nn.new")


def fresh(code: str, **environment: str) -> str:
    """What `code` prints in a new process."""
    command, environment = [sys.executable, "-c", code], os.environ | environment
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return ran.stdout.strip()


@pytest.mark.parametrize("module", ["gemma_jax", "gemma_jax.text", "gemma_checkpoints"])
def test_light_imports(module):
    """Neither JAX nor what it takes along, until something is used."""
    heavy = ["jax", "jaxlib", "flax", "orbax", "optax", "gguf", "huggingface_hub"]
    assert fresh(f"import sys, {module}; print(*(m for m in {heavy} if m in sys.modules))") == ""


def test_generate_imports_what_it_needs():
    """Not the readers of other formats, nor training, planning, or a bar that nobody sees."""
    code = (
        "import sys; from gemma_jax.cli import main; sys.argv[1:] = ["
        "'generate', 'Read the digits.', '--model', 'checkpoints/digits', '--max-new-tokens', '1'"
        ", '--modalities', 'text']\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(); print(*sys.modules)"
    )
    unneeded = ("gguf", "orbax", "tensorstore", "huggingface_hub", "torch", "PIL", "rich.progress")
    ours = ("gemma_jax.training", "gemma_jax.planning", "gemma_jax.serving")
    unneeded = (*unneeded, *ours, "gemma_jax.experiments", "gemma_checkpoints.gguf.source")
    found = fresh(code).splitlines()[-1].split()
    assert "gemma_jax.inference.decode" in found
    assert not [name for name in found if inside(name, *unneeded)]


def test_importing_takes_no_device():
    """Else a platform that does not exist would be missed."""
    modules = ("cli.app", "loading", "inference.generate", "quantisation", "evaluation.scoring")
    imports = ", ".join(f"gemma_jax.{name}" for name in modules)
    assert fresh(f"import {imports}; print('fine')", JAX_PLATFORMS="nowhere") == "fine"


def test_names_are_found_when_asked_for():
    gemma_jax = importlib.import_module("gemma_jax")
    assert set(gemma_jax.__all__) <= set(dir(gemma_jax))
    for name in gemma_jax.__all__:
        assert getattr(gemma_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        gemma_jax.nothing  # noqa: B018


def test_no_module_hides_a_name():
    """Importing a submodule binds it in its package, over a function of the same name."""
    modules = {name.removeprefix("gemma_jax.") for name in FILES if inside(name, "gemma_jax")}
    assert not modules & set(importlib.import_module("gemma_jax").__all__)
    import gemma_jax as gj
    import gemma_jax.inference.generate

    assert gj.generate is gemma_jax.inference.generate.generate
