"""Runs the notebooks and stores what they show: `make notebooks`.

    python notebooks/execute.py [01_quickstart ...]    with the extras demo, notebook and plan

What differs from machine to machine, or from run to run, is not stored: paths, addresses of
objects, times, what goes to stderr. Pictures become small. With the outputs goes a digest of the
code that made them, by which a test knows outputs of other code (tests/test_notebooks.py).
"""

import base64
import hashlib
import io
import re
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SHOWN_TWICE = {"image/png": "image/jpeg", "text/html": "text/plain"}  # the second says the same
LARGE = 60_000  # bytes of a picture


def digest(notebook: dict[str, Any]) -> str:
    """Of the code; the first cell only installs."""
    cells = [cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    text = "\0".join("".join(source) for source in cells[1:])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(path: Path) -> Any:
    """The notebook with the outputs of a new run; raises the first error of a cell."""
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    options = {"timeout": 900, "record_timing": False, "resources": {"metadata": {"path": HERE}}}
    return nbclient.NotebookClient(notebook, **options).execute()


def tidy(notebook: Any) -> None:
    """Leaves what a reader wants to see."""
    notebook.metadata.language_info = {"name": "python"}
    notebook.metadata.gemma_jax = {"outputs_of": digest(notebook)}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.metadata.pop("execution", None)
            outputs = [_tidied(out) for out in cell.outputs if out.get("name") != "stderr"]
            cell.outputs = _joined(outputs)


def _tidied(output: Any) -> Any:
    if "text" in output:
        output["text"] = without_machine(output["text"])
    data = output.get("data", {})
    for kind, again in SHOWN_TWICE.items():
        if kind in data:
            data.pop(again, None)
    if "text/plain" in data:
        data["text/plain"] = without_machine(data["text/plain"])
    if "image/png" in data:
        data["image/png"] = _small(data["image/png"])
    return output


def _joined(outputs: list[Any]) -> list[Any]:
    """What is printed comes in pieces that depend on time: neighbours become one."""
    joined = outputs[:1]
    for output in outputs[1:]:
        if "text" in output and "text" in joined[-1]:
            joined[-1]["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def without_machine(text: str) -> str:
    """The text without paths of this machine and addresses of objects."""
    for place, name in ((HERE.parent, ".."), (Path.home(), "~")):
        text = re.sub(rf"{re.escape(str(place))}(?=/|\b)", name, text)
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _small(png: str) -> str:
    """The picture in as many colours as a plot needs, or fewer if it would be large."""
    from PIL import Image

    picture, data = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), b""
    for colours in (256, 64, 32):
        few = picture.quantize(colours, kmeans=1, dither=Image.Dither.NONE)
        few.save(written := io.BytesIO(), "PNG", optimize=True)
        if len(data := written.getvalue()) < LARGE:
            break
    return base64.b64encode(data).decode()


def main(names: list[str]) -> None:
    import nbformat

    for path in [HERE / f"{name}.ipynb" for name in names] or sorted(HERE.glob("*.ipynb")):
        began = time.perf_counter()
        notebook = run(path)
        tidy(notebook)
        nbformat.write(notebook, path)
        seconds, size = time.perf_counter() - began, path.stat().st_size
        print(f"{path.name}: {seconds:.0f} s, {size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
