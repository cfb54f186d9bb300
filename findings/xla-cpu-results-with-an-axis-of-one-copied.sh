#!/usr/bin/env bash
# Expected: a donated array that a loop updates in place comes back in place, whatever axes of size 1
# the program takes away before the loop and puts back behind it: a reshape moves nothing.
# Seen with jax and jaxlib 0.10.2: where the axis of size 1 comes first, it does. Where it stands
# behind a larger one, [32, 1, slots, width], XLA's layout assignment gives the reshaped result an
# order of axes with that one outermost, which is the same memory, takes it for another layout than
# the one that results of a program have, and copies the array; the donated buffer is then filled by a
# second copy. The program needs as much memory again. It does not happen where something is
# scattered into the result.
# Exits with 0 while that is so, and with 1 when it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "jax==0.10.2" "jaxlib==0.10.2"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - 2>/dev/null <<'PYTHON'
import sys

import jax
import jax.numpy as jnp

ROWS, SLOTS, WIDTH = 32, 512, 256
EVERY = jnp.arange(ROWS)
print("jax", jax.__version__)


def update(array):
    return jax.lax.fori_loop(0, 4, lambda i, a: a.at[EVERY, i].set(1 + a[:, 0]), array)


def extra_memory(shape, at=None):
    """Share of the array that the compiled program needs besides."""

    def program(array):
        array = update(array.reshape(ROWS, SLOTS, WIDTH)).reshape(shape)
        return array if at is None else array.at[at].set(array[at])

    array = jax.ShapeDtypeStruct(shape, jnp.float32)
    memory = jax.jit(program, donate_argnums=0).lower(array).compile().memory_analysis()
    return memory.temp_size_in_bytes / (4 * ROWS * SLOTS * WIDTH)


first = extra_memory((1, ROWS, SLOTS, WIDTH))
behind = extra_memory((ROWS, 1, SLOTS, WIDTH))
scattered = extra_memory((ROWS, 1, SLOTS, WIDTH), (EVERY, 0, 0))
print(f"axis of 1 first: {first:.3f} of the array; behind another: {behind:.3f}")
print(f"behind another, with a scatter into the result: {scattered:.3f}")
sys.exit(0 if first < 0.1 and behind >= 1 and scattered < 0.1 else 1)
PYTHON
