"""Draws pictures of the documents: `python docs/images/draw.py`.

They are stored in notebooks, below the cells that make them.
"""

import base64
import json
from pathlib import Path

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent.parent / "notebooks"
# File -> notebook, and what is called in the cell that draws it.
PICTURES = {
    "attention.png": ("02_vision", "image_attention"),
    "patching.png": ("09_look_inside", "plot_patching"),
}


def picture(notebook: str, call: str) -> bytes:
    """The one picture of the one cell of a notebook that calls this."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text("utf-8"))["cells"]
    (cell,) = (c for c in cells if c["cell_type"] == "code" and call in "".join(c["source"]))
    pictures = [output.get("data", {}).get("image/png") for output in cell["outputs"]]
    (png,) = (picture for picture in pictures if picture)
    return base64.b64decode("".join(png))


def main() -> None:
    for name, source in PICTURES.items():
        (HERE / name).write_bytes(picture(*source))


if __name__ == "__main__":
    main()
