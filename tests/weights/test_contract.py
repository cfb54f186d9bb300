"""A product with few rows of activations is that of many, whatever way it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_jax.weights import contract as module
from gemma_jax.weights.contract import FEW_ROWS, LARGE, contract


@pytest.fixture
def products(monkeypatch):
    """On any platform; counts the products of few rows."""
    taken = []

    def few_rows(w_OI, x_TI):
        taken.append(x_TI.shape)
        return original(w_OI, x_TI)

    original = module.few_rows
    monkeypatch.setattr(module, "few_rows", few_rows)
    monkeypatch.setattr(module, "fuses_matrix_vector", lambda: True)
    return taken


def arrays(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape) / 8, dtype) for shape in shapes]


@pytest.mark.parametrize(
    "equation, x_shape, w_shape",
    [
        ("BTD,NHD->BTNH", (2, 3, 256), (16, 64, 256)),
        ("BTNH,DNH->BTD", (2, 3, 8, 64), (512, 8, 64)),
        ("RC,NHC->RNH", (13, 256), (16, 64, 256)),
        ("BTD,FD->BTF", (1, FEW_ROWS, 512), (512, 512)),
    ],
)
def test_few_rows(products, equation, x_shape, w_shape):
    x, w = arrays(x_shape, w_shape)
    expected = np.einsum(equation, np.float64(x), np.float64(w))
    np.testing.assert_allclose(contract(equation, x, w), expected, rtol=0, atol=1e-5)
    assert len(products) == 1

    def loss(contract):
        return jax.grad(lambda x, w: jnp.sum(contract(equation, x, w) ** 2), argnums=(0, 1))(x, w)

    for ours, theirs in zip(loss(contract), loss(jnp.einsum)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "equation, x_shape, w_shape, dtype",
    [
        ("BTD,FD->BTF", (1, FEW_ROWS + 1, 512), (512, 512), np.float32),
        ("BTD,FD->BTF", (1, 2, 512), (LARGE // 512 - 1, 512), np.float32),
        ("BTD,FD->BTF", (1, 2, 512), (512, 512), jnp.bfloat16),
        ("TBD,BFD->TBF", (2, 4, 512), (4, 512, 512), np.float32),
        ("BDT,FD->BTF", (1, 512, 2), (512, 512), np.float32),
    ],
    ids=["many rows", "a small matrix", "bfloat16", "a batch of matrices", "inputs not last"],
)
def test_others_are_products_as_they_are(products, equation, x_shape, w_shape, dtype):
    x, w = arrays(x_shape, w_shape, dtype=dtype)
    expected = jnp.einsum(equation, x, w, precision=jax.lax.Precision.HIGHEST)
    np.testing.assert_array_equal(contract(equation, x, w), expected)
    assert not products
