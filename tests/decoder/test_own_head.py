"""A model whose output head is a matrix of its own, and not the embedding table."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_jax import forward, generate, loss, matformer, token_losses
from gemma_jax.decoder.model import abstract_model
from gemma_jax.matformer.slicing import parameters
from gemma_jax.placement import shard
from gemma_jax.planning.costs import weight_bytes
from gemma_jax.planning.lowering import with_shardings
from gemma_jax.quantisation import quantise
from gemma_jax.sharding import INFERENCE, Partition, make_mesh
from gemma_jax.weights.quantized import QuantizedWeight
from gemma_jax.weights.tree import flat_params, with_params

CFG = tiny.gemma3(2, every=2, tied_head=False)
TABLE, HEAD = ("embed", "table"), ("embed", "head")


@pytest.fixture(scope="module")
def model():
    return tiny.model(CFG, "unrolled")


@pytest.fixture(scope="module")
def ids():
    return tiny.tokens(CFG, 2, 19)


def test_logits_are_those_of_the_head(model, ids):
    out = forward(model, ids, capture=("final_norm",))
    expected = out.captured["final_norm"] @ model.embed.head[...].T
    np.testing.assert_allclose(out.logits, expected, atol=1e-5)


def test_a_head_that_equals_the_table_is_no_difference(model, ids):
    table = model.embed.table.get_value()
    same = with_params(model, {HEAD: table})
    tied = with_params(
        tiny.model(tiny.gemma3(2, every=2), "unrolled"),
        {path: p.get_value() for path, p in flat_params(same).items() if path != HEAD},
    )
    assert np.array_equal(forward(same, ids).logits, forward(tied, ids).logits)


def test_losses_are_those_of_the_logits(model, ids):
    out = forward(model, ids, capture=("final_norm",))
    losses = token_losses(model, out.captured["final_norm"][:, :-1], ids[:, 1:])
    logs = jax.nn.log_softmax(out.logits[:, :-1])
    expected = -jnp.take_along_axis(logs, ids[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(losses, expected, atol=1e-5)


def test_table_and_head_are_trained_apart(model, ids):
    gradient = jax.grad(loss)(model, ids)
    moved = jax.tree.map(lambda w, g: w - 0.1 * g, model, gradient)
    before, after = flat_params(model), flat_params(moved)
    for path in (TABLE, HEAD):
        assert np.any(before[path].get_value() != after[path].get_value()), path
    unseen = np.setdiff1d(np.arange(CFG.vocab_size), ids)
    assert not np.any(gradient.embed.table[...][unseen]), "only rows that were looked up"
    assert np.all(np.any(gradient.embed.head[...], axis=1)), "every row of the softmax"
    assert loss(moved, ids) < loss(model, ids)


def test_int8_has_a_scale_for_each_row_of_the_head(model, ids):
    small = quantise(model, "int8")
    head = small.embed.head.get_value()
    assert isinstance(head, QuantizedWeight) and head.shape == (CFG.vocab_size, CFG.d_model)
    np.testing.assert_allclose(forward(small, ids).logits, forward(model, ids).logits, atol=0.3)
    np.testing.assert_allclose(loss(small, ids), loss(model, ids), atol=0.1)


def test_a_mesh_splits_the_head_as_it_splits_the_table(model, ids):
    split = shard(model, make_mesh(CFG, jax.devices()[:4], tensor=4), INFERENCE)
    table, head = (flat_params(split)[path].get_value() for path in (TABLE, HEAD))
    assert head.sharding == table.sharding
    assert head.addressable_shards[0].data.shape == (CFG.vocab_size // 4, CFG.d_model)
    np.testing.assert_allclose(forward(split, ids).logits, forward(model, ids).logits, atol=2e-5)


def test_slices_keep_the_head_and_it_counts_as_computed(ids):
    cfg = replace(tiny.gemma3n(4, 1), tied_head=False)
    whole, cut = tiny.model(cfg, "unrolled"), matformer.Slice(ffn_widths=(24,) * 4)
    small, view = matformer.slice(whole, cut), matformer.at(whole, cut)
    assert view.embed.head.get_value() is whole.embed.head.get_value()
    assert np.array_equal(forward(small, ids).logits, forward(view, ids).logits)
    tied = parameters(tiny.gemma3n(4, 1))
    assert parameters(cfg) == tied + cfg.vocab_size * cfg.d_model


def test_speculation_writes_what_the_model_writes(model, ids):
    prompts, cut = [row.tolist() for row in ids], matformer.Slice(ffn_widths=(24, 24))
    plain = generate(model, None, prompts, max_new_tokens=12)
    drafted = generate(model, None, prompts, max_new_tokens=12, draft=cut)
    assert [row.token_ids for row in drafted] == [row.token_ids for row in plain]


def test_a_step_reads_the_head_and_rows_of_the_table():
    partition = Partition.of(make_mesh(CFG, jax.devices()[:1], data=1))
    own, tied = (
        weight_bytes(with_shardings(abstract_model(cfg), partition))
        for cfg in (CFG, tiny.gemma3(2, every=2))
    )
    assert own["all"] - tied["all"] == 4 * CFG.vocab_size * CFG.d_model
    assert own["read"] == tied["read"]
