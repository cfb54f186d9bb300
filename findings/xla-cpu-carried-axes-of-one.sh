#!/usr/bin/env bash
# Expected: a loop that writes one slot of a large array per step, and multiplies with all of it,
# updates the array in place on a CPU, whatever axes of size 1 the array has.
# Seen with jax and jaxlib 0.10.2: carried as [slots, width] it does. Carried as
# [1, 1, slots, width], which is the same memory, XLA's CPU backend takes the axes of size 1 out of
# the products alone, fuses the update with the change of shape, once for the product and once for
# the next step, and copies both arrays whole, twice in every step, to keep the two apart.
# Exits with 0 while that is so, and with 1 when it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import re
import sys

import jax
import jax.numpy as jnp

SLOTS, WIDTH, QUERIES = 1024, 256, 4
print("jax", jax.__version__)


def copies(shape):
    def step(i, carry):
        x, keys, values = carry
        new = x[:1] * 0.5
        at = (0,) * (len(shape) - 2) + (i, 0)
        keys, values = (
            jax.lax.dynamic_update_slice(a, new.reshape(*shape[:-2], 1, WIDTH), at)
            for a in (keys, values)
        )
        queries = x.reshape(*shape[:-2], QUERIES, WIDTH)
        weights = jax.nn.softmax(jnp.einsum("...rh,...sh->...rs", queries, keys))
        x = jnp.einsum("...rs,...sh->...rh", weights, values).reshape(QUERIES, WIDTH)
        return x, keys, values

    def loop(x, keys, values, n):
        return jax.lax.fori_loop(0, n, step, (x, keys, values))

    large = jax.ShapeDtypeStruct(shape, jnp.float32)
    small = jax.ShapeDtypeStruct((QUERIES, WIDTH), jnp.float32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    program = jax.jit(loop, donate_argnums=(1, 2)).lower(small, large, large, count).compile()
    return len(re.findall(rf"= f32\[(?:1,)*{SLOTS},{WIDTH}\]\S* copy\(", program.as_text()))


found = {shape: copies(shape) for shape in ((SLOTS, WIDTH), (1, 1, SLOTS, WIDTH))}
for shape, count in found.items():
    print(f"carried as {list(shape)}: {count} copies of the whole array")
sys.exit(0 if found[SLOTS, WIDTH] == 0 and found[1, 1, SLOTS, WIDTH] >= 4 else 1)
PYTHON
