"""Draws the picture of the README: `python docs/images/draw.py`, with the extra `notebook`.

It runs notebooks/02_vision.ipynb and keeps what the cell that draws attention over an image shows.
"""

import base64
from pathlib import Path

import nbclient
import nbformat

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent.parent / "notebooks"


def main() -> None:
    notebook = nbformat.read(NOTEBOOKS / "02_vision.ipynb", as_version=4)
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    (cell,) = (cell for cell in notebook.cells if "image_attention" in cell.source)
    (png,) = (o.data["image/png"] for o in cell.outputs if "image/png" in o.get("data", {}))
    (HERE / "attention.png").write_bytes(base64.b64decode(png))


if __name__ == "__main__":
    main()
