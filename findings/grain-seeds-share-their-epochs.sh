#!/usr/bin/env bash
# Expected: MapDataset.shuffle(seed=...).repeat() draws an order for every seed and epoch, so that
# runs with seeds 0, 1 and 2 see their data in orders that have nothing to do with each other.
# Seen with grain 0.2.18: epoch e of seed s is epoch 0 of seed s + e. Two runs with neighbouring
# seeds read the same orders one epoch apart, and error bars over seeds 0, 1, 2 of three epochs each
# come from five orders, not nine.
# Exits with 0 while that is so, and with 1 when it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "grain==0.2.18"
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

import grain

COUNT = 12
print("grain", importlib.metadata.version("grain"))


def order(seed, epoch):
    rows = grain.MapDataset.range(COUNT).shuffle(seed=seed).repeat()
    return [rows[i] for i in range(epoch * COUNT, (epoch + 1) * COUNT)]


orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
for (seed, epoch), rows in orders.items():
    print(f"seed {seed}, epoch {epoch}: {rows}")
different = {tuple(rows) for rows in orders.values()}
print(f"{len(different)} different orders of {len(orders)}")
shared = all(rows == order(seed + epoch, 0) for (seed, epoch), rows in orders.items())
sys.exit(0 if shared and len(different) == 5 else 1)
PYTHON
