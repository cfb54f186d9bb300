"""Weights stored narrow, arithmetic in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from marks import nightly

from gemma_jax import Runtime, forward, generate
from gemma_jax.quantisation import quantise
from gemma_jax.storages import MADE_STORAGES, storage_bits, storage_group
from gemma_jax.weights import stored as module
from gemma_jax.weights.contract import contract
from gemma_jax.weights.protocol import dense
from gemma_jax.weights.quantized import QuantizedWeight
from gemma_jax.weights.stored import StoredWeight

EQUATIONS = {
    "BTD,NHD->BTNH": ("BTD", (6, 4, 16)),
    "BTNH,DNH->BTD": ("BTNH", (16, 6, 4)),
    "BTD,VD->BTV": ("BTD", (64, 16)),
}


def weight(equation, seed=0):
    letters, shape = EQUATIONS[equation]
    dims = equation.split(",")[1].split("->")[0]
    inputs = "".join(c for c in dims if c in letters)
    return jax.random.normal(jax.random.key(seed), shape), dims, inputs


class One(nnx.Module):
    """A model of one matrix."""

    def __init__(self, array, inputs, dims):
        self.w, self.runtime = nnx.Param(array, dims=dims, inputs=inputs), Runtime()


def stored(storage, array, inputs, dims):
    return quantise(One(array, inputs, dims), storage).w.get_value()


@pytest.mark.parametrize("way", ["vectors", "whole", "tiles"])
@pytest.mark.parametrize("equation", list(EQUATIONS))
def test_every_way_of_the_product_is_the_product(monkeypatch, equation, way):
    """All ways multiply by the same widened weight; what storing lost is in that weight."""
    monkeypatch.setattr(module, "VECTOR_ROWS", 100 if way == "vectors" else 0)
    monkeypatch.setattr(module, "fuses_matrix_vector", lambda: True)
    monkeypatch.setattr(module, "WHOLE_BYTES", 0 if way == "tiles" else 1 << 30)
    array, dims, inputs = weight(equation)
    narrow = stored("bfloat16", array, inputs, dims)
    sizes = dict(zip(dims, array.shape)) | {"B": 2, "T": 3}
    x = jax.random.normal(jax.random.key(1), [sizes[c] for c in EQUATIONS[equation][0]])
    wide = narrow.rows(jnp.arange(array.shape[0]))
    expected = jnp.einsum(equation, x, wide, precision="highest")
    actual = jax.jit(lambda x, w: contract(equation, x, w))(x, narrow)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize("equation", list(EQUATIONS))
def test_int8_errs_by_half_a_step_of_its_channel(equation):
    array, dims, inputs = weight(equation)
    narrow = stored("int8", array, inputs, dims)
    outputs = array.shape[: array.ndim - len(inputs)]
    assert narrow.matrix.codes.dtype == jnp.int8 and narrow.matrix.scale.size == np.prod(outputs)
    step = narrow.matrix.to_rows().scale.reshape(outputs + (1,) * len(inputs))
    assert (jnp.abs(dense(narrow) - array) <= 0.501 * step).all()


def test_bfloat16_is_rounded_to_nearest():
    array, dims, inputs = weight("BTD,VD->BTV")
    wide = stored("bfloat16", array, inputs, dims).rows(jnp.arange(len(array)))
    np.testing.assert_array_equal(wide, array.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_channel_of_zeros_stays_zero():
    array = jnp.zeros((4, 8)).at[1].set(1.0)
    wide = stored("int8", array, "D", "VD").rows(jnp.arange(4))
    assert not wide[0].any()
    np.testing.assert_allclose(wide, array, atol=0.004)  # half a step of 2 / 255


@pytest.mark.parametrize(
    "storage, tolerance, layout",
    [
        ("int8", 0.2, "scan"),
        ("bfloat16", 0.1, "unrolled"),
        *nightly(("int8", 0.2, "unrolled"), ("bfloat16", 0.1, "scan")),
    ],
)
def test_a_stored_model_stays_close_and_generates(storage, tolerance, layout):
    model = tiny.model(tiny.gemma3(3), layout=layout)
    small = quantise(model, storage)
    ids = tiny.tokens(model.cfg, 2, 20)
    expected, actual = forward(model, ids).logits, forward(small, ids).logits
    error = jnp.abs(actual - expected).mean()
    assert 0 < error < tolerance * jnp.std(expected)
    row = ids[0].tolist()
    done = generate(small, None, [row], max_new_tokens=6)[0]
    full = forward(small, np.array([row + done.token_ids[:-1]], np.int32)).logits[0, 19:]
    assert full.argmax(axis=-1).tolist() == done.token_ids


def test_bytes_shrink_and_norms_stay():
    model = tiny.model(tiny.gemma3())

    def size(model):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(model))

    assert size(quantise(model, "bfloat16")) < 0.52 * size(model)
    small = quantise(model, "int8")
    assert size(small) < 0.35 * size(model)
    assert isinstance(small.embed.table.get_value(), QuantizedWeight)
    assert isinstance(quantise(model, "bfloat16").embed.table.get_value(), StoredWeight)
    np.testing.assert_array_equal(small.final_norm.scale[...], model.final_norm.scale[...])
    assert quantise(model, "float32").runtime == Runtime()


@pytest.mark.parametrize("storage", MADE_STORAGES)
def test_every_storage_takes_the_bits_it_is_said_to(storage):
    array = jax.random.normal(jax.random.key(0), (64, 128))
    scales = 0
    if storage.startswith("int"):
        scales = 4 * array.size // (storage_group(storage) or 128)
    codes = array.size * storage_bits(storage) // 8
    assert stored(storage, array, "D", "VD").nbytes == codes + scales
