"""The notebooks run from top to bottom on trained weights, and are stored with what they show."""

import ast
import base64
import copy
import importlib.util
import io
import json
import os
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

SPEC = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
execute = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(execute)


def of_this_machine(text: str) -> list[str]:
    """Paths, addresses of objects and times in an output."""
    places = r"/(?:tmp|home|root|usr|opt|work|content|mnt|Users)/[\w./-]+|[A-Z]:\\\w+"
    return re.findall(rf"{places}| at 0x[0-9a-f]+|\d\d:\d\d:\d\d", text)


def shows(source: str) -> bool:
    """Whether a cell has something to show: it prints, plots, or ends in a value."""
    *_, last = ast.parse(source).body
    ends_in_value = isinstance(last, ast.Expr) and not source.rstrip().endswith(";")
    return ends_in_value or any(call in source for call in ("print(", "plt.subplots", ".plot_"))


def faults_of_cell(cell: dict) -> list[str]:
    texts, pictures, found = [], [0], []
    for output in cell["outputs"]:
        data = output.get("data", {})
        pictures += [len("".join(data[kind])) for kind in data if kind.startswith("image/")]
        texts += [
            output.get("text", ""),
            *(data[kind] for kind in data if kind.startswith("text/")),
        ]
        if output["output_type"] == "error" or output.get("name") == "stderr":
            found.append("an error or a warning")
    if machine := of_this_machine("\n".join("".join(text) for text in texts)):
        found.append(f"something of this machine: {machine}")
    if max(pictures) > execute.LARGE * 4 / 3:  # in base 64
        found.append("a large picture")
    if cell["metadata"].get("execution"):
        found.append("times of its run")
    return found


def faults(notebook: dict) -> list[str]:
    """What is wrong with the stored outputs of a notebook."""
    found = []
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("cells were not run once each, from top to bottom")
    if notebook["metadata"].get("gemma_jax") != {"outputs_of": execute.digest(notebook)}:
        found.append("the outputs are of other code")
    for number, cell in enumerate(cells, 1):
        found += [f"cell {number} has {fault}" for fault in faults_of_cell(cell)]
        if number > 1 and shows("".join(cell["source"])) and not cell["outputs"]:
            found.append(f"cell {number} shows nothing")
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_with_what_it_shows(path):
    """If this fails: `make notebooks`, or `python notebooks/execute.py NAME`."""
    notebook = json.loads(path.read_text("utf-8"))
    assert faults(notebook) == []
    assert len(notebook["cells"]) <= 20
    assert path.stat().st_size < 300_000


def test_pictures_in_documents_are_those_of_the_notebooks():
    """If this fails: `python docs/images/draw.py`."""
    images = ROOT / "docs" / "images"
    draw = runpy.run_path(str(images / "draw.py"))
    for name, source in draw["PICTURES"].items():
        assert (images / name).read_bytes() == draw["picture"](*source), name


def stored() -> dict:
    """A notebook of two cells as it should be."""
    cells = [
        {
            "cell_type": "code",
            "execution_count": number,
            "metadata": {},
            "outputs": [{"output_type": "stream", "name": "stdout", "text": ["2\n"]}],
            "source": ["print(1 + 1)"],
        }
        for number in (1, 2)
    ]
    notebook = {"cells": cells, "metadata": {}}
    return notebook | {"metadata": {"gemma_jax": {"outputs_of": execute.digest(notebook)}}}


LARGE = {"output_type": "display_data", "data": {"image/png": "A" * 90_000}}
SPOILT = {
    "top to bottom": ("execution_count", 3),
    "other code": ("source", ["print(2)"]),
    "error or a warning": ("outputs", [{"output_type": "error"}]),
    "this machine: .*home": ("outputs", [{"output_type": "stream", "text": "in /home/me/x.py"}]),
    "this machine: .* at 0x": ("outputs", [{"output_type": "stream", "text": "<F at 0x7f00>"}]),
    "times of its run": ("metadata", {"execution": {"iopub.execute_input": "2025"}}),
    "large picture": ("outputs", [LARGE]),
    "shows nothing": ("outputs", []),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_what_should_not_be_stored_is_found(fault):
    assert faults(stored()) == []
    spoilt, (field, value) = copy.deepcopy(stored()), SPOILT[fault]
    spoilt["cells"][1][field] = value
    (found,) = faults(spoilt)
    assert re.search(fault, found)


def test_what_is_stored_is_tidied():
    nbformat = pytest.importorskip("nbformat", reason="pip install 'gemma-jax[notebook]'")
    pillow = pytest.importorskip("PIL.Image", reason="pip install 'gemma-jax[notebook]'")
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    pillow.fromarray(noise).save(png := io.BytesIO(), "PNG")
    spoilt = stored()
    spoilt["cells"][1] |= {
        "metadata": {"execution": {"shell.execute_reply": "2025"}},
        "outputs": [
            {"output_type": "stream", "name": "stderr", "text": "a warning"},
            {"output_type": "stream", "name": "stdout", "text": f"{ROOT}/a "},
            {"output_type": "stream", "name": "stdout", "text": f"{Path.home()}/b"},
            {
                "output_type": "display_data",
                "metadata": {},
                "data": {
                    "image/png": base64.b64encode(png.getvalue()).decode(),
                    "image/jpeg": "the same",
                    "text/plain": "<Figure at 0x7f0012>",
                },
            },
        ],
    }
    spoilt["cells"][0]["outputs"] = []
    spoilt["cells"][0]["source"] = "import os"
    notebook = nbformat.from_dict(spoilt)
    execute.tidy(notebook)
    assert faults(notebook) == []
    text, picture = notebook.cells[1].outputs
    assert text.text == "../a ~/b" and picture.data["text/plain"] == "<Figure>"
    assert set(picture.data) == {"image/png", "text/plain"}
    shown = pillow.open(io.BytesIO(base64.b64decode(picture.data["image/png"]))).convert("RGB")
    assert np.abs(np.asarray(shown, int) - noise).mean() < 25


def test_badges_and_clones_name_one_repository():
    texts = {path: path.read_text("utf-8") for path in (ROOT / "README.md", *NOTEBOOKS)}
    found = re.findall(r"github(?:\.com)?/([\w-]+/gemma-jax)\b", "\n".join(texts.values()))
    assert len(set(found)) == 1, "say the same address everywhere"
    for path in NOTEBOOKS:
        badge = f"colab.research.google.com/github/{found[0]}/blob/main/notebooks/{path.name}"
        first, *_ = json.loads(texts[path])["cells"]
        assert badge in "".join(first["source"]) and badge in texts[ROOT / "README.md"]
        assert f"git clone -q https://github.com/{found[0]}" in texts[path]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_looks_for_all_that_is_imported(path):
    """Not editable: what such an install registers is read only when Python starts."""
    cells = [c for c in json.loads(path.read_text("utf-8"))["cells"] if c["cell_type"] == "code"]
    first, *rest = ("".join(c["source"]) for c in cells)
    assert "%pip install" in first and " -e " not in first
    needed = set(re.search('needed = "(.*)"', first)[1].split())
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", "\n".join(rest), re.M))
    come_along = {"jax", "numpy"}  # with gemma_jax
    come_along |= {name for name in imported if f'find_spec("{name}")' in "\n".join(rest)}
    assert imported - sys.stdlib_module_names - come_along <= needed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_that_they_import_exist(path):
    """By day; at night all cells run."""
    found = set()
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "%pip" in source:  # no Python
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("gemma_jax"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "gj":
                found.add(f"gemma_jax.{node.attr}")
    assert found and {name for name in found if not exists(name)} == set()


def exists(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_a_name_that_does_not_exist_is_seen():
    assert exists("gemma_jax.generate") and exists("gemma_jax.matformer.search")
    assert not exists("gemma_jax.generat") and not exists("gemma_jax.nowhere.search")


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
    assert "convert light energy into chemical energy" in printed(done, "gj.load(")
    assert "' cold'" in printed(done, "final_norm").splitlines()[-1]
    assert "<start_of_turn>user\nBe brief.\n\nWhy" in printed(done, "render")
    for picture in ("imshow", "plot_layers"):
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
    losses = [float(s) for s in re.findall(r"\d\.\d{4}", printed(done, "plot_slices"))]
    for equal_share, searched in (losses[:2], losses[2:]):
        assert searched <= equal_share
    assert losses[1] < losses[0] - 0.003


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


@pytest.mark.nightly
def test_your_own_architecture():
    done = run("05_your_own_architecture", ROOT / "notebooks")
    sizes = re.findall(r"[\d,]+(?= parameters)", printed(done, "class SquaredBlock"))
    assert len(sizes) == 3 and sizes[0] == sizes[2]
    assert any("image/png" in o.get("data", {}) for o in outputs(done, "plt.subplots"))
    counts, *losses = map(float, re.findall(r"\d\.\d\d", printed(done, "plt.subplots")))
    assert len(losses) == 3 and max(losses) < counts - 0.8
    assert len(printed(done, "run_ablation").splitlines()) == 2
    *equal, refused = printed(done, "gj.save").splitlines()
    assert [line.endswith("True") for line in equal] == [True, True] and "block" in refused


@pytest.mark.nightly
def test_audio():
    for needed in ("soundfile", "soxr"):
        pytest.importorskip(needed, reason="pip install 'gemma-jax[audio]'")
    done = run("06_audio", ROOT / "notebooks")
    lines = printed(done, "gj.transcribe(model, tok, file").splitlines()
    heard = {
        name.removesuffix(".wav").partition("-")[2]: text for name, text in map(str.split, lines)
    }
    assert len(heard) > 2 and sum(name != text for name, text in heard.items()) <= 1
    *growing, last = printed(done, "LiveTranscript").splitlines()
    texts = [line.partition(" s ")[2].strip() for line in growing]  # the first may be none
    assert len(texts) >= 4 and last.split()[2] == texts[-1] and len(texts[-1]) == 4
    assert "first soft token after 100 ms" in printed(done, "audio_stream")
    for picture in ("plot_mel", "plot_sound_attention"):
        assert any("image/png" in o.get("data", {}) for o in outputs(done, picture))


@pytest.mark.nightly
def test_finetune():
    pytest.importorskip("grain", reason="pip install 'gemma-jax[train]'")
    done = run("07_finetune", ROOT / "notebooks")
    assert any("image/png" in o.get("data", {}) for o in outputs(done, "plt.subplots"))
    lines = printed(done, "before = gj.generate").splitlines()
    counted = 0
    for line in lines:
        asked, rest = line.split("before:")
        old, new = rest.split(", after:")
        numbers = [int(n) for n in re.findall(r"\d+", asked)]
        right = ", ".join(str(numbers[-1] + i) for i in (1, 2, 3))
        assert right not in old
        counted += right in new
    assert len(lines) == 4 and counted >= 3
    *_, loaded, merged = printed(done, "gj.load_adapter").splitlines()
    assert loaded.endswith("True") and merged.endswith("True")
    assert "model.safetensors" in printed(done, "gj.save(merged, tok")
    assert "False" not in printed(done, "gj.save(merged, tok")


@pytest.mark.nightly
def test_serve():
    for needed in ("openai", "uvicorn", "llguidance"):
        pytest.importorskip(needed, reason="pip install 'gemma-jax[serve]' openai")
    done = run("08_serve_and_tools", ROOT / "notebooks")
    assert '"finish_reason"' in printed(done, "by_hand = json.load")
    *pieces, same = printed(done, "stream=True").replace("\n", " | ").strip(" |").split(" | ")
    assert len(pieces) > 2 and same == "the same text: True"
    written, parsed = printed(done, "response_format=Method").splitlines()
    assert json.loads(written).keys() == {"returns", "arguments", "raises"}
    assert parsed.startswith("Method(returns=")
    city = '"(Berlin|Paris|Rome)"'
    asked, *between, last = printed(done, "gj.Tools([distance]").splitlines()
    assert asked.startswith("user ") and last.startswith("assistant ")
    assert between[0].startswith("assistant ") and "'name': 'distance'" in between[0]
    assert all(re.fullmatch(r"tool +'\d+ km'", line) for line in between[1:]) and between[1:]
    called, *_ = printed(done, 'tool_choice="required"').splitlines()
    call = rf'distance\({{"start": {city}, "end": {city}}}\) -> \d+ km'
    assert re.fullmatch(call, called)
    metrics = printed(done, "/metrics")
    assert 'status="200"} 5.0' in metrics and "running: False" in metrics


@pytest.mark.nightly
def test_look_inside(real_gguf):
    pytest.importorskip("PIL", reason="pip install 'gemma-jax[vision]'")
    done = run("09_look_inside", ROOT / "notebooks")
    plots = ("logit_lens", "attention", "patching", "image_attention")
    for picture in (*plots, "contributions(parts", "contributions(sizes"):
        found = outputs(done, f"gj.viz.plot_{picture}")
        assert any("image/png" in o.get("data", {}) for o in found), picture
    total, difference = (
        float(n) for n in re.findall(r"[\d.]+\d", printed(done, "gj.logit_contributions"))
    )
    assert total == pytest.approx(difference, abs=0.002) and total > 3
    looks = printed(done, "def look_away").splitlines()
    as_it_is, one, four, against = (float(line.split()[-1]) for line in looks)
    assert as_it_is == pytest.approx(difference, abs=0.01)
    assert as_it_is > one > four and against > as_it_is + 1
