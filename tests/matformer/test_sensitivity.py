"""Which layers matter: against slices that are cut and measured one by one."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_jax import forward
from gemma_jax.matformer import Slice, search, sensitivity, slice_config, slice_model
from gemma_jax.matformer.slice_search import WidthSlices
from gemma_jax.matformer.slicing import parameters

CFG = tiny.gemma3n(6, 3)
USELESS = 4  # a layer whose second half does nothing; not a sparse one
TEXT = np.where(np.arange(12) < [[12], [7]], tiny.tokens(CFG, 2, 12), -1)


@pytest.fixture(scope="module")
def model():
    model = tiny.model(CFG, "unrolled")
    down = model.blocks[0][USELESS].ffn.down
    down.w[...] = down.w[...].at[..., 24:].set(0)
    return model


def loss(model):
    """Mean over all tokens of both rows that have one before them."""
    nats = []
    logits_BTV = forward(model, np.maximum(TEXT, 0)).logits  # what follows a text changes nothing
    for row, log_probs in zip(TEXT, jax.nn.log_softmax(logits_BTV)):
        ids = row[row >= 0]
        nats += [-log_probs[t, ids[t + 1]] for t in range(len(ids) - 1)]
    return float(np.mean(nats))


def narrowed(layer, width):
    return Slice(ffn_widths=tuple(width if i == layer else 48 for i in range(6)))


def test_sensitivity_is_what_slices_lose(model):
    found = sensitivity(model, TEXT, (1.0, 0.5))
    assert found.shape == (6, 2)
    np.testing.assert_allclose(found[:, 0], 0, atol=1e-6)
    submodel = slice_model(model, narrowed(5, 24))
    assert found[5, 1] == pytest.approx(loss(submodel) - loss(model), abs=2e-5)
    assert abs(found[USELESS, 1]) < 1e-6
    assert np.abs(np.delete(found[:, 1], USELESS)).min() > 1e-4


def test_search_measures_what_it_returns_and_meets_the_budget(model):
    budget = parameters(CFG) - 5000
    points = search(model, TEXT, budget, fractions=(0.5, 0.25), skip_blocks=False)
    assert points[0].submodel == Slice.whole(CFG)
    assert [p.parameters <= budget for p in points] == [False] * (len(points) - 1) + [True]
    for point in (points[0], points[-1]):
        assert point.parameters == parameters(slice_config(CFG, point.submodel))
        assert point.loss == pytest.approx(loss(slice_model(model, point.submodel)), abs=2e-5)
    sizes = [point.parameters for point in points]
    assert sizes == sorted(sizes, reverse=True)


def test_layers_are_narrowed_one_by_one(model):
    slices = WidthSlices(model, TEXT, (), (0.5, 0.25))
    budget = parameters(CFG) - 5000
    path = [slices.point(slices.full), *slices.narrow(slices.full, budget)]
    assert [p.parameters <= budget for p in path] == [False] * (len(path) - 1) + [True]
    for before, after in pairwise(path):
        changed = np.subtract(before.submodel.ffn_widths, after.submodel.ffn_widths)
        assert (changed > 0).sum() == 1 and (changed >= 0).all()


def test_what_costs_nothing_goes_first(model):
    """Steps that gain are free as well; among those that cost, none comes before the useless."""
    slices = WidthSlices(model, TEXT, (), (0.5,))
    path = [slices.point(slices.full), *slices.narrow(slices.full, parameters(CFG) - 12_000)]
    costs = sensitivity(model, TEXT, (0.5,))[:, 0]
    order = [
        int(np.flatnonzero(np.subtract(a.submodel.ffn_widths, b.submodel.ffn_widths))[0])
        for a, b in pairwise(path)
    ]
    dear = [layer for layer in order if costs[layer] > 1e-5]
    assert USELESS in order and dear
    assert order.index(USELESS) < order.index(dear[0])
    assert dear == sorted(dear, key=lambda layer: costs[layer])


def test_no_uniform_slice_of_the_size_is_better(model):
    slices = WidthSlices(model, TEXT, (), ())
    uniform = [slices.point((width,) * 6) for width in (36, 24, 12)]
    for budget in (*(p.parameters for p in uniform), uniform[0].parameters - 1):
        best = search(model, TEXT, budget, skip_blocks=False)[-1]
        assert best.parameters <= budget
        assert best.loss <= min(p.loss for p in uniform if p.parameters <= budget)


def test_channels_move_to_where_they_are_worth_more(model):
    """From the layer whose second half does nothing to one that loses by being narrow."""
    slices = WidthSlices(model, TEXT, (), (0.5,))
    costs = sensitivity(model, TEXT, (0.5,))[:, 0]
    dear = int(costs.argmax())
    wasteful = slices.point(tuple(24 if i == dear else 48 for i in range(6)))
    better = slices.exchange(wasteful, wasteful.parameters)
    assert better.parameters <= wasteful.parameters
    assert better.loss < wasteful.loss - costs[dear] / 2
    assert better.submodel.ffn_widths[dear] == 48


def test_whole_blocks_are_left_out_where_that_is_best(model):
    """With the last block made a burden, the search drops it before it narrows a layer."""
    graph, state = jax.tree.flatten(model)[1], jax.tree.flatten(model)[0]
    harmful = jax.tree.unflatten(graph, state)
    for layer in (3, 4, 5):
        norm = harmful.blocks[0][layer].post_ffn_norm
        norm.scale[...] = 30 * jnp.ones_like(norm.scale[...])
    budget = parameters(CFG) - 12_000
    points = search(harmful, TEXT, budget, fractions=(0.5, 0.25))
    assert points[-1].submodel.skip_layers == (3, 4, 5)
    plain = search(harmful, TEXT, budget, fractions=(0.5, 0.25), skip_blocks=False)
    assert points[-1].loss < plain[-1].loss


def test_what_cannot_be_measured(model):
    for call, message in (
        (lambda: sensitivity(model, TEXT, (0.0,)), "must lie in"),
        (lambda: sensitivity(model, TEXT, (1.5,)), "must lie in"),
        (lambda: sensitivity(model, [[1], [2]]), "T of 2 or more"),
        (lambda: sensitivity(model, [1, 2, 3]), "T of 2 or more"),
        (lambda: search(model, TEXT, 10), "no slice has 10 parameters; the smallest tried has"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
