"""Parameters out of a model, and into another one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_jax.weights.tree import flat_params, map_params, with_attributes, with_params

EMBEDDING = ("embed", "table")


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.gemma1())


def test_paths_lead_to_parameters(model):
    params = flat_params(model)
    assert params[EMBEDDING].get_value() is model.embed.table.get_value()
    assert params["blocks", 0, 0, "ffn", "up", "w"].dims == "FD"
    assert len(params) == len(jax.tree.leaves(model))


def test_a_model_with_another_parameter_shares_the_rest(model):
    other = with_params(model, {EMBEDDING: jnp.zeros((96, 32))})
    assert not other.embed.table.get_value().any() and model.embed.table.get_value().any()
    assert other.embed.table.dims == "VD"
    for path, param in flat_params(other).items():
        shared = param.get_value() is flat_params(model)[path].get_value()
        assert shared == (path != EMBEDDING)
    assert jax.tree.structure(other) == jax.tree.structure(model)


def test_unknown_paths_are_refused(model):
    with pytest.raises(ValueError, match="no parameter embed.tables; `flat_params` lists"):
        with_params(model, {("embed", "tables"): jnp.zeros(1)})


def test_a_function_of_some_parameters(model):
    doubled = map_params(model, lambda p: 2 * p.get_value(), lambda path, p: p.dims == "VD")
    for path, param in flat_params(model).items():
        factor = 2 if path == EMBEDDING else 1
        ours = flat_params(doubled)[path].get_value()
        np.testing.assert_array_equal(ours, factor * param.get_value())


def test_a_model_that_computes_otherwise(model):
    other = with_attributes(model, runtime=replace(model.runtime, remat=True))
    assert other.runtime.remat and not model.runtime.remat
    assert all(a is b for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(model)))
