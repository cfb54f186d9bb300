"""`cross_entropy(..., return_best=True)`: is the label the likeliest entry?"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_kernels.cross_entropy import IMPLEMENTATIONS, cross_entropy


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_the_best_label_is_the_argmax(name, soft_cap):
    rng = np.random.default_rng(0)
    x_BTD, table_VD = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 4, 8), (101, 8)))
    best_BT = jnp.argmax(x_BTD @ table_VD.T, axis=-1)
    other_BT = (best_BT + 1) % 101
    labels_BT = best_BT.at[0].set(other_BT[0]).at[1, 1].set(-1).at[2, 2].set(101)
    options = dict(soft_cap=soft_cap, chunk=7, implementation=name)
    losses_BT, lse_BT, is_best_BT = cross_entropy(
        x_BTD, table_VD, labels_BT, return_lse=True, return_best=True, **options
    )
    expected_BT = np.asarray(labels_BT == best_BT)
    np.testing.assert_array_equal(is_best_BT, expected_BT)
    assert not expected_BT[0].any() and expected_BT.sum() == 6
    np.testing.assert_array_equal(losses_BT, cross_entropy(x_BTD, table_VD, labels_BT, **options))
    assert lse_BT.shape == (3, 4)


def test_gradients_are_those_without_it():
    rng = np.random.default_rng(1)
    x_BTD, table_VD = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 4, 8), (32, 8)))
    labels_BT = jnp.array([[1, 2, 3, -1]])

    def total(x_BTD, **options):
        losses = cross_entropy(x_BTD, table_VD, labels_BT, **options)
        return jnp.sum(losses[0] if options else losses)

    np.testing.assert_array_equal(
        jax.grad(lambda x: total(x, return_best=True))(x_BTD), jax.grad(total)(x_BTD)
    )
