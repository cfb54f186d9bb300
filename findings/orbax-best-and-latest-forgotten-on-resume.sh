#!/usr/bin/env bash
# Expected: a CheckpointManager that is to keep the latest checkpoint and the best one by a metric
# keeps two at most, also when a second process goes on in the folder of the first: the metrics were
# given to `save`.
# Seen with orbax-checkpoint 0.12.8: without `best_fn` in the options nothing of the metrics is
# written, and a policy AnyPreservationPolicy([LatestN(1), BestN(...)]) that worked in one process
# has nothing to go by in the next, which then keeps every step that it did not save itself.
# Exits with 0 while that is so, and with 1 when it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "orbax-checkpoint==0.12.8" "jax==0.10.2" "jaxlib==0.10.2"
cat >"$work/go.py" <<'PYTHON'
import sys

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

folder, steps = sys.argv[1], [int(step) for step in sys.argv[2].split(",")]
LOSS = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 2.2, 6: 2.4, 7: 2.6}
best = policies.BestN(get_metric_fn=lambda m: -m["loss"] if m else -np.inf, n=1)
policy = policies.AnyPreservationPolicy([policies.LatestN(1), best])
options = ocp.CheckpointManagerOptions(
    preservation_policy=policy, enable_async_checkpointing=False
)
with ocp.CheckpointManager(folder, options=options) as manager:
    for step in steps:
        args = ocp.args.StandardSave({"w": np.ones(3)})
        manager.save(step, args=args, metrics={"loss": LOSS[step]})
    print(*manager.all_steps())
PYTHON
export JAX_PLATFORMS=cpu
one=$("$work/venv/bin/python" "$work/go.py" "$work/one" 1,2,3,4,5,6,7 2>/dev/null)
"$work/venv/bin/python" "$work/go.py" "$work/two" 1,2,3,4 >/dev/null 2>&1
two=$("$work/venv/bin/python" "$work/go.py" "$work/two" 5,6,7 2>/dev/null)
echo "orbax-checkpoint 0.12.8: kept by one process: $one; by two, one after the other: $two"
[ "$one" != "$two" ]
