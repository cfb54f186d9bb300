"""Rounding to int4 and int8 in groups, as compressed-tensors 0.20.1 does (symmetric, min-max).

`near_tie` marks values within rounding noise of the middle between two codes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.goldens import DATA
from safetensors.numpy import load_file

from gemma_jax.weights.rounding import round_to_groups

GOLDEN = load_file(DATA / "quant" / "groups.safetensors")
WEIGHT = GOLDEN["in.weight"]
GROUPS = {"g32": 32, "g128": 128, "channel": WEIGHT.shape[1]}


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_and_scales_are_those_of_the_reference(bits, group, jitted):
    run = jax.jit(round_to_groups, static_argnums=(1, 2)) if jitted else round_to_groups
    codes, scale = run(jnp.asarray(WEIGHT), bits, GROUPS[group])
    expected = {
        name: GOLDEN[f"out.int{bits}_{group}.{name}"] for name in ("values", "scales", "near_tie")
    }
    np.testing.assert_array_max_ulp(np.asarray(scale), expected["scales"], maxulp=1)
    off = np.abs(np.asarray(codes, np.int32) - expected["values"])
    assert not off[expected["near_tie"] == 0].any() and off.max() <= 1
    assert codes.dtype == (jnp.int4 if bits == 4 else jnp.int8) and scale.dtype == jnp.float32


def test_codes_go_down_to_the_last_and_zeros_have_a_scale_of_one():
    assert GOLDEN["out.int4_g32.values"].min() == -8 and GOLDEN["out.int8_g32.values"].min() == -128
    codes, scale = round_to_groups(jnp.array([[8.0, -2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), 4, 2)
    assert codes.tolist() == [[7, -2, 7, 0], [0, 0, 0, 0]]
    assert scale.tolist() == [[pytest.approx(8 / 7.5), pytest.approx(1 / 7.5)], [1.0, 1.0]]


def test_stacks_are_rounded_like_each_of_their_matrices():
    stack = jnp.asarray(WEIGHT).reshape(3, 4, -1)
    for ours, theirs in zip(round_to_groups(stack, 4, 64), round_to_groups(stack[1], 4, 64)):
        np.testing.assert_array_equal(
            np.asarray(ours[1], np.float32), np.asarray(theirs, np.float32)
        )
