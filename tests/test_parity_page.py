"""The page of figures: rows come from tests, and become lines of the page."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from parity_rows import FILES, TESTS

ROOT = TESTS.parent
spec = importlib.util.spec_from_file_location("page", ROOT / "docs" / "parity" / "page.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)

PLUGIN = """
import parity_rows
from pathlib import Path

parity_rows.TESTS = Path(__file__).parent
parity_rows.FILES = {"test_one.py": {"model": "none", "feature": "sums", "oracle": "arithmetic"}}
pytest_plugins = ["parity_rows"]
"""
ONE = """
import numpy as np
import pytest
from parity_rows import Tolerance, seen

@pytest.mark.parametrize("family", ["gemma3n"])
def test_near(family):
    np.testing.assert_allclose([1.0, 2.5], [1.0, 2.0], rtol=0, atol=1.0)
    np.testing.assert_allclose([1.0, 2.25], [1.0, 2.0], rtol=0, atol=1.0)

def test_layers():
    seen(np.array([[0.5], [0.25]]), Tolerance(2.0, "layer_outputs", "g3_text", 0.2))
    seen(0.5, 1.0, "model.grad.a")

def test_far():
    np.testing.assert_array_equal([1, 2], [1, 4])

def test_left_out():
    pytest.skip("no such device")
"""


def run(folder: Path, *options: str) -> dict:
    """Rows of a pytest of its own."""
    (folder / "conftest.py").write_text(PLUGIN)
    (folder / "test_one.py").write_text(ONE)
    (folder / "test_other.py").write_text("def test_other():\n    assert True\n")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    env.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", str(folder), "-p",
               "no:cacheprovider", "--parity-report", "out/rows.json", *options]  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return json.loads((folder / "out" / "rows.json").read_text("utf-8"))


@pytest.mark.parametrize("options", [["-n0"], ["-n2", "--parity-only"]], ids=["one", "workers"])
def test_rows_are_what_tests_compared(tmp_path, options):
    told = run(tmp_path, *options)
    rows = {row["test"].partition("::test_")[2]: row for row in told["rows"]}
    assert set(rows) == {"near[gemma3n]", "layers", "far", "left_out"}
    assert (
        told["versions"].keys() >= {"python", "jax", "numpy"}
        and "--parity-report" in told["command"]
    )
    near, layers = rows["near[gemma3n]"], rows["layers"]
    assert near["model"] == "Gemma 3n text" and near["feature"] == "sums"
    assert near["figures"] == {"": {"error": 0.5, "tolerance": 1.0}}, "the worst of two"
    assert layers["model"] == "Gemma 3 text"
    assert layers["figures"]["layer_outputs"] == {
        "error": 0.5, "tolerance": 2.0, "noise": 0.2, "layers": [0.5, 0.25]
    }  # fmt: skip
    assert layers["figures"]["gradients"] == {"error": 0.5, "tolerance": 1.0}
    assert rows["far"]["figures"][""] == {"error": 2.0, "tolerance": 0.0}
    outcomes = {name: row["outcome"] for name, row in rows.items()}
    assert outcomes == {"near[gemma3n]": "passed", "layers": "passed", "far": "failed",
                        "left_out": "skipped"}  # fmt: skip
    assert rows["left_out"]["reason"] == "no such device"


def row(test: str, outcome="passed", **figures) -> dict:
    return {
        "test": test, "model": "Gemma 3n text", "feature": "MatFormer slices", "case": "logits",
        "oracle": "transformers", "nightly": True, "outcome": outcome, "reason": "",
        "figures": figures,
    }  # fmt: skip


def page(*rows, known=(), files=(), defects=()) -> str:
    told = {"command": "pytest", "date": "today", "machine": "a desk", "device": "1 x cpu",
            "versions": {"jax": "1.2"}, "rows": list(rows)}  # fmt: skip
    return figures.page(told, list(known), files, list(defects))


def test_a_line_says_error_tolerance_noise_and_command():
    error = {"error": 2e-5, "tolerance": 4e-5, "noise": 4e-6, "layers": [1e-5, 0.0, 2e-5]}
    html = page(row("tests/a.py::test_b[<x>]", layer_outputs=error))
    command = "-m &#x27;nightly or not nightly&#x27; &quot;tests/a.py::test_b[&lt;x&gt;]"
    assert command in html
    for part in ("2.0e-5", "4.0e-5", "4.0e-6", "50%", "jax 1.2", "1 x cpu", "<polyline", "<circle"):
        assert part in html
    assert "[<x>]" not in html


def test_what_failed_and_what_is_missing_is_named():
    files = {"parity/test_gone.py": {}, "a.py": {}}
    failed = row(
        "tests/a.py::test_b", "failed",
        logits={"error": 3.0, "tolerance": 2.0}, loss={"error": 1.0, "tolerance": 2.0},
    )  # fmt: skip
    html = page(failed, known=[row("tests/a.py::test_absent")], files=files)
    assert "Failed: 1</summary><ul><li><code>tests/a.py::test_b" in html
    assert "Files without a row: 1</summary><ul><li><code>tests/parity/test_gone.py" in html
    assert "not in this one: 1</summary><ul><li><code>tests/a.py::test_absent" in html
    assert html.count('data-result="failed"') == html.count('data-result="passed"') == 1


@pytest.mark.parametrize("outcome, told", [("passed", "2 passed"), ("failed", "2 failed")])
def test_a_known_defect_has_the_result_of_its_tests(outcome, told):
    defect = {
        "project": "other", "what": "wrong", "ours": "right",
        "tests": ["t.py::test_a", "t.py::gone"],
        "links": ["https://github.com/some/thing/issues/12"],
    }  # fmt: skip
    rows = [row("t.py::test_a[1]", outcome), row("t.py::test_a[2]", outcome), row("t.py::test_ab")]
    html = page(*rows, defects=[defect])
    assert f'<b class="{outcome}">{told}</b>' in html and "some/thing#12" in html
    assert '<b class="skipped">not in this run</b>' in html


def test_without_rows_the_page_says_how_to_make_them(tmp_path):
    assert "make parity" in figures.body(tmp_path / "none.json")
    with pytest.raises(SystemExit, match="does not exist"):
        figures.main(str(tmp_path / "none.json"), str(tmp_path / "page.html"))


def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_exists():
    named = {
        f"tests/{file}::{test}" for file, facts in FILES.items() for test in facts.get("tests", [])
    }
    named |= {test for defect in figures.defects() for test in defect["tests"]}
    if figures.STORED.exists():
        stored = json.loads(figures.STORED.read_text("utf-8"))["rows"]
        named |= {row["test"].partition("[")[0] for row in stored}
    files = {test.partition("::")[0] for test in named} | {f"tests/{file}" for file in FILES}
    there = {f"{file}::{name}" for file in files for name in functions(file)}
    assert not named - there


def test_every_file_of_parity_and_properties_is_on_the_page():
    for folder in ("parity", "properties"):
        found = {path.relative_to(TESTS).as_posix() for path in (TESTS / folder).glob("test_*.py")}
        assert not found - FILES.keys()
