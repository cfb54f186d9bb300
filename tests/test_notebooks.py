"""The notebooks run from top to bottom on trained weights, and are stored without outputs."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STORED = ROOT / "tests" / "parity" / "data" / "real270m.json"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path):
    cells = json.loads(path.read_text("utf-8"))["cells"]
    assert len(cells) <= 20
    for cell in cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_looks_for_all_that_is_imported(path):
    """Not editable: what such an install registers is read only when Python starts."""
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    first, *rest = ("".join(c["source"]) for c in cells)
    assert "%pip install" in first and " -e " not in first
    needed = set(re.search('needed = "(.*)"', first)[1].split())
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", "\n".join(rest), re.M))
    come_along = {"jax", "numpy"}  # with gemma_jax
    assert imported - sys.stdlib_module_names - come_along <= needed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_that_they_import_exist(path):
    """By day; at night all cells run."""
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "%pip" in source:  # no Python
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("gemma_jax"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def run(name: str, folder: Path):
    """The notebook after a run in `folder`; raises the first error of a cell."""
    nbformat = pytest.importorskip("nbformat", reason="pip install 'gemma-jax[notebook]'")
    nbclient = pytest.importorskip("nbclient", reason="pip install 'gemma-jax[notebook]'")
    pytest.importorskip("matplotlib", reason="pip install 'gemma-jax[notebook]'")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    return nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()


def outputs(notebook, source: str) -> list:
    """Outputs of the one cell that contains `source`."""
    (cell,) = (c for c in notebook.cells if c.cell_type == "code" and source in c.source)
    return cell.outputs


def printed(notebook, source: str) -> str:
    return "".join(o.text for o in outputs(notebook, source) if o.get("name") == "stdout")


@pytest.mark.nightly
def test_all_cells_run_where_there_is_jupyter_alone(tmp_path):
    """As on Colab: the first cell installs the rest, into a kernel that runs already."""
    clone, python = tmp_path / "gemma-jax", tmp_path / "venv" / "bin" / "python"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    shutil.copytree(ROOT / "notebooks", clone / "notebooks", dirs_exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "nbconvert", "ipykernel"], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [python, "-m", "nbconvert", "--to", "notebook", "--execute", "01_quickstart.ipynb"],
        cwd=clone / "notebooks", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.nightly
def test_quickstart(real_gguf, tmp_path):
    done = run("01_quickstart", tmp_path)
    prompts = json.loads(STORED.read_text("utf-8"))["prompts"]
    greedy = next(p["greedy_text"] for p in prompts if p["name"] == "english_fact")
    text = printed(done, "gj.load(").rstrip("\n")
    assert len(text) > 40 and greedy.startswith(text)
    assert "' cold'" in printed(done, "final_norm").splitlines()[-1]
    assert "<start_of_turn>user\nBe brief.\n\nWhy" in printed(done, "render")
    for picture in ("imshow", "plt.bar"):
        assert any("image/png" in o.get("data", {}) for o in outputs(done, picture))
    sensible, shuffled = (float(s.split()[1]) for s in printed(done, "gj.score").splitlines())
    assert sensible < shuffled


@pytest.mark.nightly
def test_vision():
    pytest.importorskip("sklearn", reason="pip install 'gemma-jax[notebook]'")
    done = run("02_vision", ROOT / "notebooks")  # reads the checkpoint beside it, writes nothing
    assert "How many digits? 3\n" in printed(done, "three.png")
    shares = [int(line.split()[-4]) for line in printed(done, "held_out=True").splitlines()]
    assert len(shares) == 4 and min(shares) >= 85
    for picture in ("image_attention", "draw_crops"):
        assert any("image/png" in o.get("data", {}) for o in outputs(done, picture))
    assert "(0, 0, 32, 32)" in printed(done, "draw_crops")
    read, written = printed(done, 'Read the digits.", images=[crop]').split("| written:")
    assert sum(a == b for a, b in zip(read.split(), written.split())) >= 3


@pytest.mark.nightly
def test_matformer():
    done = run("03_matformer", ROOT / "notebooks")
    assert "a view adds 0 bytes" in printed(done, "live_arrays")
    assert "the same logits: True" in printed(done, "live_arrays")
    rows = printed(done, "for _ in range(2)").splitlines()
    assert len(rows) == 6 and rows[:3] == rows[3:] and len(set(rows)) == 3
    for picture in ("plot_sensitivity", "plot_slices"):
        assert any("image/png" in o.get("data", {}) for o in outputs(done, picture))
    searched, half = (float(s) for s in re.findall(r"\d\.\d{3}", printed(done, "plot_slices")))
    assert searched < half + 0.05


@pytest.mark.nightly
def test_plan_and_shard():
    pytest.importorskip("libtpu", reason="pip install 'gemma-jax[plan]'")
    done = run("04_plan_and_shard", ROOT / "notebooks")
    shares = {}
    *sizes, arrays = printed(done, "def measured_bytes").splitlines()
    for line in sizes:
        ours, everywhere = re.findall(r"[\d.]+(?= GB)", line)
        shares[line.split()[0]] = float(ours) / float(everywhere)
    assert len(shares) == 5 and shares["gemma3-27b"] == pytest.approx(0.168, abs=0.002)
    (axes,) = outputs(done, "plt.subplots")
    assert "image/png" in axes["data"]
    real, compiled = (int(s.replace(",", "")) for s in re.findall(r"[\d,]{9,}", arrays))
    assert 0 <= compiled - real < 1000
    plan = printed(done, "weights moved")
    assert "fits: True" in plan and "per token: none" in plan and "'all-reduce'" in plan
    predicted, found = (float(s) for s in re.findall(r"[\d.]+(?= GB)", plan.splitlines()[1]))
    assert found == pytest.approx(predicted, rel=0.02)
    assert " does not fit" in printed(done, "in meshes(")
    assert len(printed(done, "gpu:{kind}").splitlines()) == 11
    assert [line.split()[0] for line in printed(done, "together =").splitlines()] == [
        "True",
        "True",
    ]
    assert len(outputs(done, "visualize_array_sharding")) >= 2
    one, many = printed(done, "gj.loss").splitlines()
    assert float(one.split()[1]) == pytest.approx(float(many.split()[1]), rel=1e-5)
