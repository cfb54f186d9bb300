"""Weights with adapters: whatever lies below, they are what their merged arrays are."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import nightly

from gemma_jax.weights.adapted import Adapted, alike, row_norms, with_magnitudes
from gemma_jax.weights.adapted_rows import AdaptedRows
from gemma_jax.weights.contract import contract
from gemma_jax.weights.gather import lookup
from gemma_jax.weights.protocol import array_dims, dense, head_rows, take
from gemma_jax.weights.quantized import QuantizedWeight
from gemma_jax.weights.stored import StoredWeight
from gemma_jax.weights.view import Part

ATOL = 2e-5  # ten times the rounding of float32 sums in another order; mistakes show at 0.1
SIZES = dict(B=2, T=3, D=32, N=4, H=8, F=48, V=40, L=3, P=8)
EQUATIONS = {  # of the product, and how many of the weight's axes are inputs
    "queries": ("BTD,NHD->BTNH", 1),
    "output": ("BTNH,DNH->BTD", 2),
    "down": ("BTF,DF->BTD", 1),
    "head": ("BTD,VD->BTV", 1),
}


def random(letters, seed=0, scale=0.3):
    shape = [SIZES.get(x, 5) for x in letters]  # R is 5
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def bits(array):
    narrow = jax.lax.bitcast_convert_type(array.astype(jnp.bfloat16), jnp.uint16)
    return StoredWeight(narrow)


BASES = {
    "array": lambda w, inputs: w,
    "bfloat16": lambda w, inputs: bits(w),
    "int8": lambda w, inputs: QuantizedWeight.rounded(w, inputs, 8, None),
    "int4": lambda w, inputs: QuantizedWeight.rounded(w, inputs, 4, 8),
    "part": lambda w, inputs: Part.of(jnp.concatenate([w, w]), -w.ndim, len(w)),
}


def adapted(dims, inputs, base="array", gain=False, seed=0):
    letters = dims[:-inputs], dims[-inputs:]
    weight = Adapted(
        BASES[base](random(dims, seed), inputs),
        random("R" + letters[1], seed + 1),
        random(letters[0] + "R", seed + 2),
        jnp.float32(0.7),
    )
    return replace(weight, gain=1 + random(letters[0], seed + 3)) if gain else weight


def by_hand(weight):
    """The merged array, by the formula."""
    outputs = weight.b.ndim - 1
    change = np.tensordot(np.asarray(weight.b), np.asarray(weight.a), axes=1)
    whole = np.asarray(dense(weight.base)) + float(weight.scale) * change
    if weight.gain is not None:
        whole *= np.asarray(weight.gain).reshape(
            weight.b.shape[:-1] + (1,) * (whole.ndim - outputs)
        )
    return whole


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("base", ["array", "int8", *nightly("bfloat16", "int4", "part")])
@pytest.mark.parametrize("name", EQUATIONS)
def test_products_are_those_of_the_merged_array(name, base, gain):
    equation, inputs = EQUATIONS[name]
    letters, dims, _ = equation.replace("->", ",").split(",")
    weight, x = adapted(dims, inputs, base, gain), random(letters, 9, 1.0)
    np.testing.assert_allclose(dense(weight), by_hand(weight), atol=ATOL)
    expected = np.einsum(equation, x, by_hand(weight))
    np.testing.assert_allclose(contract(equation, x, weight), expected, atol=10 * ATOL)
    one = x[:1, :1]  # a row alone goes another way
    np.testing.assert_allclose(contract(equation, one, weight), expected[:1, :1], atol=10 * ATOL)


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("dims", ["VD", "VLP"])
def test_rows_are_those_of_the_merged_table(dims, gain):
    weight, ids = adapted(dims, len(dims) - 1, gain=gain), jnp.array([[3, 0, 39], [7, 7, 1]])
    np.testing.assert_allclose(lookup(weight, ids), by_hand(weight)[ids], atol=ATOL)
    np.testing.assert_allclose(head_rows(weight), by_hand(weight), atol=ATOL)


@pytest.mark.parametrize("gain", [False, True])
@pytest.mark.parametrize("name", EQUATIONS)
def test_a_cut_is_a_cut_of_the_merged_array(name, gain):
    equation, inputs = EQUATIONS[name]
    dims = equation.split(",")[1].split("->")[0]
    weight = adapted(dims, inputs, gain=gain)
    for axis in range(-len(dims), 0):
        for index in (3, (0, 2, 3)):
            cut = take(weight, axis, index)
            expected = take(jnp.asarray(by_hand(weight)), axis, index)
            assert cut.shape == expected.shape
            np.testing.assert_allclose(dense(cut), expected, atol=ATOL)


def test_letters_say_how_a_mesh_splits_it():
    weight = adapted("NHD", 1, gain=True)
    letters = array_dims(weight, "NHD")
    assert (letters.base, letters.a, letters.b, letters.gain) == ("NHD", "_D", "NH_", "NH")
    letters = array_dims(adapted("DNH", 2), "DNH")
    assert (letters.a, letters.b, letters.scale) == ("_NH", "D_", "")


def test_layers_of_a_stack_are_read_one_by_one():
    layers = [adapted("NHD", 1, "int8", gain=True, seed=seed) for seed in (0, 5)]
    stack = jax.tree.map(lambda *rows: jnp.stack(rows), *layers)
    x = random("BTD", 9, 1.0)
    equation = "BTD,NHD->BTNH"
    _, ys = jax.lax.scan(lambda c, w: (c, contract(equation, x, w)), 0, stack)
    for y, layer in zip(ys, layers):
        np.testing.assert_allclose(y, contract(equation, x, layer), atol=ATOL)
    np.testing.assert_allclose(dense(stack), np.stack([by_hand(w) for w in layers]), atol=ATOL)
    norms = np.stack([np.sqrt((by_hand(replace(w, gain=None)) ** 2).sum(-1)) for w in layers])
    np.testing.assert_allclose(row_norms(stack), norms, rtol=1e-5)


def test_unlike_ranks_and_missing_adapters_stack():
    rows = [adapted("FD", 1), take_rank(adapted("FD", 1, seed=5), 2), random("FD", 8)]
    same = alike(rows)
    assert {row.b.shape[-1] for row in same} == {5}
    for row, one in zip(rows, same):
        np.testing.assert_allclose(dense(one), dense(row), atol=ATOL)
    assert alike([random("FD")])[0].shape == (48, 32)  # none: as they are


def take_rank(weight, rank):
    return replace(weight, a=weight.a[:rank], b=weight.b[..., :rank])


def test_rows_of_zeros_have_a_gain_too():
    weight = replace(adapted("FD", 1), base=jnp.zeros((48, 32)), b=jnp.zeros((48, 5)))
    assert np.isfinite(with_magnitudes(weight, jnp.ones(48)).gain).all()


def test_norms_have_no_gradient():
    """By the formula of the paper: dm = sum(dW' V) / n, dB = s (m / n) dW' A^T."""
    weight, x = adapted("FD", 1), random("BTD", 9, 1.0)
    m = 1 + random("F", 4)

    def value(m, b):
        return jnp.sum(
            jnp.sin(contract("BTD,FD->BTF", x, with_magnitudes(replace(weight, b=b), m)))
        )

    by_m, by_b = jax.grad(value, argnums=(0, 1))(m, weight.b)
    whole, norms = by_hand(weight), row_norms(weight)
    merged = with_magnitudes(weight, m).dense()
    cos = np.cos(np.einsum("BTD,FD->BTF", x, merged))
    by_w = np.einsum("BTF,BTD->FD", cos, x)
    np.testing.assert_allclose(by_m, (by_w * whole).sum(1) / norms, rtol=1e-3, atol=1e-4)
    expected = 0.7 * (m / norms)[:, None] * (by_w @ np.asarray(weight.a).T)
    np.testing.assert_allclose(by_b, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture
def several():
    """Two adapters beside one weight, and each alone."""

    def make(dims, inputs, chosen):
        alone = [adapted(dims, inputs, gain=True, seed=s) for s in (0, 5)]
        alone = [replace(one, base=alone[0].base) for one in alone]
        nothing = replace(alone[0], b=jnp.zeros_like(alone[0].b), gain=jnp.ones_like(alone[0].gain))
        three = [nothing, *alone]
        arrays = {
            name: jnp.stack([getattr(one, name) for one in three])
            for name in ("a", "b", "scale", "gain")
        }
        chosen = jnp.array(chosen, jnp.int32)
        return AdaptedRows(alone[0].base, chosen_B=chosen, names=("x", "y"), **arrays), three

    return make


@pytest.mark.parametrize("name", ["queries", "output", *nightly("down", "head")])
def test_every_row_has_its_own(several, name):
    equation, inputs = EQUATIONS[name]
    letters, dims, _ = equation.replace("->", ",").split(",")
    x = random(letters, 9, 1.0)
    weight, three = several(dims, inputs, [2, 0])
    y = contract(equation, x, weight)
    for row, i in enumerate([2, 0]):
        alone = contract(equation, x[row : row + 1], three[i])
        np.testing.assert_allclose(y[row : row + 1], alone, atol=10 * ATOL)
    for_all, _ = several(dims, inputs, [1])
    np.testing.assert_allclose(contract(equation, x, for_all), contract(equation, x, three[1]))
    cut = take(weight, -1, 2)
    np.testing.assert_allclose(cut.a, weight.a[..., :2])
    with pytest.raises(ValueError, match="2 adapters are chosen, but the batch has 3 rows"):
        contract(equation, jnp.concatenate([x, x[:1]]), weight)


@pytest.mark.parametrize("dims", ["VD", "VLP"])
def test_every_row_reads_its_own_table(several, dims):
    ids = jnp.array([[3, 0, 39], [7, 7, 1]])
    weight, three = several(dims, len(dims) - 1, [1, 2])
    rows = lookup(weight, ids)
    for row, i in enumerate([1, 2]):
        np.testing.assert_allclose(rows[row], lookup(three[i], ids[row]), atol=ATOL)
    with pytest.raises(ValueError, match="rows with different adapters have no weight in common"):
        dense(weight)
