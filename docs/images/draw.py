"""Draws the picture of the README: `python docs/images/draw.py`.

It is stored in notebooks/02_vision.ipynb, below the cell that draws attention over an image.
"""

import base64
import json
from pathlib import Path

HERE = Path(__file__).parent
NOTEBOOK = HERE.parent.parent / "notebooks" / "02_vision.ipynb"


def main() -> None:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    (cell,) = (cell for cell in cells if "image_attention" in "".join(cell["source"]))
    pictures = [output.get("data", {}).get("image/png") for output in cell["outputs"]]
    (png,) = (picture for picture in pictures if picture)
    (HERE / "attention.png").write_bytes(base64.b64decode("".join(png)))


if __name__ == "__main__":
    main()
