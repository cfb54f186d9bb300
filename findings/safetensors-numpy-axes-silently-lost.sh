#!/usr/bin/env bash
# Expected: safetensors.numpy.save_file either writes a transposed or strided array as it reads, or
# refuses it, as safetensors.torch.save_file does ("You are trying to save a non contiguous tensor").
# Seen with safetensors 0.8.0 and numpy 2.4.6: it writes the memory as it lies, under the shape that
# the array has. Nothing is raised, and what is loaded again holds other numbers: a transposed
# matrix comes back with its entries in the order before, every second column as the first columns.
# Exits with 0 while that is so, and with 1 when it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "safetensors==0.8.0" "numpy==2.4.6"
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

print("safetensors", safetensors.__version__, "numpy", np.__version__)
rows = np.arange(6, dtype=np.float32).reshape(2, 3)
given = {"transposed": rows.T, "strided": rows[:, ::2], "plain": rows}
save_file(given, "out.safetensors")
again = load_file("out.safetensors")
for name, array in given.items():
    print(f"{name}: saved {array.tolist()}, loaded {again[name].tolist()}")
lost = [name for name, array in given.items() if not np.array_equal(array, again[name])]
sys.exit(0 if lost == ["transposed", "strided"] else 1)
PYTHON
