#!/usr/bin/env bash
# Expected: the first steps of optax.adam with its default b2=0.999, in float32, are those of Adam
# to within a few units in the last place of float32 (1e-7), since all it does is a few products.
# Seen with optax 0.2.8, jax 0.10.2: they are 6e-6 too small, fifty times as much, and all entries
# by the same share. 1 - 0.999**t is computed in float32, where 0.999 and its powers lie so near to
# 1 that their difference from it keeps three digits less. With b2=0.95 the error is not seen.
# Exits with 0 while that is so, and with 1 when it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "optax==0.2.8" "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

print("optax", optax.__version__, "jax", jax.__version__)
GRADIENTS = np.random.default_rng(0).standard_normal((3, 1000)).astype(np.float32)


def exact(b1, b2):
    """Adam in float64: the updates of the last of three steps, at rate 1."""
    m = v = np.zeros(1000)
    for g in GRADIENTS.astype(np.float64):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    return -(m / (1 - b1**3)) / (np.sqrt(v / (1 - b2**3)) + 1e-8)


def shares(b1, b2):
    rule = optax.adam(1.0, b1=b1, b2=b2, eps=1e-8)
    state = rule.init(jnp.zeros(1000))
    for g in GRADIENTS:
        updates, state = rule.update(jnp.asarray(g), state)
    share = np.asarray(updates, np.float64) / exact(b1, b2) - 1
    return np.median(share)


found = {b2: shares(0.9, b2) for b2 in (0.95, 0.999)}
for b2, share in found.items():
    print(f"b2={b2}: updates of the third step differ by {share:+.1e} of themselves")
sys.exit(0 if abs(found[0.95]) < 5e-7 and -1e-5 < found[0.999] < -3e-6 else 1)
PYTHON
