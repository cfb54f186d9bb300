"""Training of adapters: what moves, what does not, and that it is the same however a model lies."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from marks import nightly
from parity.goldens import DATA

import gemma_jax as gj
from gemma_jax.adapters import factors_of, merge
from gemma_jax.decoder.model import abstract_model
from gemma_jax.matformer import Slice, at, slice_model
from gemma_jax.placement import shard
from gemma_jax.quantisation import quantise
from gemma_jax.sharding import TRAINING, make_mesh
from gemma_jax.training.lora import Lora, train_adapters
from gemma_jax.training.objectives import elastic, next_token
from gemma_jax.training.step import make_step
from gemma_jax.weights.adapted import Adapted
from gemma_jax.weights.protocol import dense
from gemma_jax.weights.tree import flat_params, map_params

CFG = tiny.gemma3(layers=3)
ALIKE = tiny.gemma1()  # three layers of one kind: one is compiled
ATOL = 2e-5  # ten times the rounding of float32 sums in another order; mistakes show at 0.1
UNEVEN = Lora(
    rank=3,
    layers=(0, 2),
    rank_pattern={"blocks.2.attn.*": 5, "*.q.w": 2},
    alpha_pattern={"*.ffn.*": 4.0},
)


def run(model, settings, optimizer, batches, objective=next_token):
    """The model and state after some steps, and the metrics."""
    trained, frozen, join = gj.lora(model, settings, jax.random.key(3))
    init, step = make_step(objective, optimizer, join)
    state, step, metrics = init(trained, jax.random.key(0)), jax.jit(step, donate_argnums=0), []
    for batch in batches:
        state, found = step(state, frozen, batch)
        metrics.append(found)
    return join(state.trained, frozen), state, metrics


def filled(model, settings=UNEVEN, seed=1):
    """A model with adapters that matter."""
    trained, frozen, join = gj.lora(model, settings, jax.random.key(seed))
    rng = np.random.default_rng(seed)

    def fill(path, value):
        if path[-1] != "b":
            return value
        a = np.asarray(trained[*path[:-1], "a"])
        stacked = frozen[*path[:-1], "scale"].ndim
        used = np.any(a.reshape(*a.shape[: stacked + 1], -1) != 0, axis=-1)
        used = used.reshape(used.shape[:-1] + (1,) * (value.ndim - used.ndim) + used.shape[-1:])
        size = 0.03 if "embed" in path else 0.3  # a table's other factor is large
        return jnp.asarray(size * rng.standard_normal(value.shape) * used, jnp.float32)

    return join({path: fill(path, value) for path, value in trained.items()}, frozen)


def leaves(model):
    return {p: v.get_value() for p, v in flat_params(model).items()}


@pytest.mark.parametrize("dora", [False, True])
def test_a_new_adapter_changes_nothing(dora):
    model, tokens = tiny.model(ALIKE), tiny.tokens(ALIKE, 2, 9)
    trained, frozen, join = gj.lora(model, Lora(rank=2, dora=dora), jax.random.key(0))
    adapted = join(trained, frozen)
    np.testing.assert_allclose(
        gj.forward(adapted, tokens).logits, gj.forward(model, tokens).logits, atol=ATOL
    )
    for path, value in leaves(model).items():
        base = leaves(adapted)[path]
        assert (base.base if isinstance(base, Adapted) else base) is value  # no array is copied
    for path, a in trained.items():
        if path[-1] == "a":  # uniform in +-1 / sqrt(inputs)
            bound = a[0, 0].size ** -0.5
            assert 0.5 * bound < np.abs(a).max() <= bound
            assert not np.any(trained[*path[:-1], "b"])


def test_layers_without_adapters_and_ranks_that_are_not_there_stay_zero():
    """Through moments, decay and all: their gradients are zero, and nothing else moves them."""
    model, tokens = tiny.model(CFG), tiny.tokens(CFG, 2, 9)
    settings = replace(UNEVEN, dora=True)
    after, _, metrics = run(model, settings, optax.adamw(1e-2, weight_decay=0.1), [tokens] * 4)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    wanted = {"attn.q.w": {0: 2, 2: 5}, "attn.k.w": {0: 3, 2: 5}, "ffn.up.w": {0: 3, 2: 3}}
    found = factors_of(after)
    for name, ranks in wanted.items():
        assert {i: found[f"blocks.{i}.{name}"].rank for i in (0, 1, 2)
                if f"blocks.{i}.{name}" in found} == ranks  # fmt: skip
    assert found["blocks.0.ffn.up.w"].scale == pytest.approx(4 / 3)
    assert found["blocks.2.attn.k.w"].scale == pytest.approx(16 / 5)
    for path, value in leaves(after).items():
        if isinstance(value, Adapted):  # DoRA, too, leaves the layer in the middle alone
            idle = np.asarray(value.scale) == 0
            assert np.all(np.asarray(value.gain)[idle] == 1), path
            assert not np.any(np.asarray(value.a)[idle])


@pytest.mark.parametrize("dora", [True, *nightly(False)])
def test_scanned_is_unrolled(dora):
    cfg = replace(ALIKE, layers=ALIKE.layers[:2])
    ranks = {"blocks.1.attn.*": 5, "*.q.w": 2}
    settings = replace(UNEVEN, dora=dora, layers=None, rank_pattern=ranks)
    scanned, tokens = tiny.model(cfg), tiny.tokens(cfg, 2, 9)
    models = (scanned, tiny.relayout(scanned, "unrolled"))
    (one, _, ours), (other, _, theirs) = (
        run(m, settings, optax.adamw(1e-2), [tokens] * 2) for m in models
    )
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    found, again = factors_of(one), factors_of(other)
    assert found.keys() == again.keys()
    for name, factors in found.items():
        np.testing.assert_allclose(factors.b, again[name].b, atol=1e-4)


@pytest.mark.parametrize("storage", ["int8", *nightly("int4", "bfloat16")])
def test_over_stored_weights_it_is_over_what_they_stand_for(storage):
    """QLoRA: loss and gradients are those of the same adapters beside the widened weights."""
    model, tokens = quantise(tiny.model(ALIKE), storage), tiny.tokens(ALIKE, 2, 9)
    wide = map_params(model, lambda param: dense(param.get_value()))
    assert_same_gradients(model, wide, tokens)


def assert_same_gradients(model, wide, tokens, atol=ATOL):
    found = []
    for one in (model, wide):
        trained, frozen, join = train_adapters(filled(one, replace(UNEVEN, dora=True)))
        value = jax.jit(jax.value_and_grad(lambda t, f: gj.loss(join(t, f), tokens)))  # noqa: B023
        found.append(value(trained, frozen))
    (loss, gradients), (expected, widened) = found
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert all(np.any(gradients[path]) for path in gradients)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(gradient, widened[path], atol=atol, err_msg=str(path))


@pytest.mark.nightly
def test_over_the_blocks_of_a_file():
    """Q4_0 and Q6_K, as llama.cpp stored them."""
    file = str(DATA / "quant" / "g3_q4_0.gguf")
    model, wide = (gj.load_model(file, weights=w, dtype="float32") for w in ("stored", "float32"))
    kinds = {type(value).__name__ for value in leaves(model).values()}
    assert "QuantizedWeight" in kinds
    assert_same_gradients(model, wide, np.array([[2, 9, 41, 77, 5]]), atol=2e-4)


def test_on_a_mesh_factors_lie_beside_their_weights():
    model, tokens = tiny.model(ALIKE), tiny.tokens(ALIKE, 4, 12)
    split = shard(model, make_mesh(ALIKE, jax.devices()[:4], fsdp=2, tensor=2), TRAINING)
    whole, parts = filled(model), filled(split)
    np.testing.assert_allclose(
        gj.forward(parts, tokens).logits, gj.forward(whole, tokens).logits, atol=ATOL
    )
    trained = gj.lora(split, UNEVEN).trained
    path = ("blocks", 0, 0, "attn", "q", "w")  # N is split over `tensor`, D over `fsdp`
    a, b = (trained[*path, kind].sharding for kind in "ab")
    assert a.shard_shape((3, 5, 32)) == (3, 5, 16) and b.shard_shape((3, 4, 16, 5)) == (3, 2, 16, 5)


@pytest.mark.nightly
def test_on_a_mesh_it_learns_what_it_does_on_one_device():
    model, tokens = tiny.model(ALIKE), tiny.tokens(ALIKE, 4, 12)
    split = shard(model, make_mesh(ALIKE, jax.devices()[:4], fsdp=2, tensor=2), TRAINING)
    settings = Lora(rank=2, targets=("blocks.*.attn.*", "embed.table"), tie_head=True)
    (_, state, ours), (_, parts, theirs) = (
        run(m, settings, optax.adam(1e-2), [tokens] * 2) for m in (model, split)
    )
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)
    assert state.trained.keys() == parts.trained.keys()


def test_a_slice_of_an_adapted_model_has_the_cut_adapter():
    """Trained on the whole and served as any slice: merged first or cut first, it is the same."""
    cfg = tiny.gemma3n(4, 1)
    model, tokens = filled(tiny.model(cfg, "unrolled")), tiny.tokens(cfg, 2, 9)
    narrow = Slice(ffn_widths=(20, 30, 48, 7))
    expected = gj.forward(slice_model(merge(model), narrow), tokens).logits
    for small in (slice_model(model, narrow), at(model, narrow)):
        np.testing.assert_allclose(gj.forward(small, tokens).logits, expected, atol=ATOL)
    even = Slice(ffn_widths=(16,) * 4)  # layers that lie apart are stacked: ranks are made even
    stacked = slice_model(model, even, layout="scan")
    np.testing.assert_allclose(
        gj.forward(stacked, tokens).logits,
        gj.forward(slice_model(merge(model), even), tokens).logits,
        atol=ATOL,
    )


@pytest.mark.nightly
def test_slices_learn_through_the_adapter_of_the_whole():
    cfg = tiny.gemma3n(4, 1)
    model, tokens = tiny.model(cfg, "unrolled"), tiny.tokens(cfg, 2, 9)
    objective = partial(elastic, submodels=(Slice(ffn_widths=(16,) * 4),))
    _, _, metrics = run(model, Lora(rank=2), optax.adam(1e-2), [tokens] * 4, objective)
    assert metrics[-1]["slice_0"] < metrics[0]["slice_0"]
    assert metrics[-1]["whole"] < metrics[0]["whole"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_adapter_of_an_embedding_is_the_heads_or_not(tied):
    model, tokens = tiny.model(ALIKE), tiny.tokens(ALIKE, 2, 9)
    settings = Lora(rank=2, targets=("embed.table",), tie_head=tied)
    adapted = filled(model, settings)
    assert adapted.cfg.tied_head == tied and (adapted.embed.head is None) == tied
    if not tied:  # one array in two roles
        assert adapted.embed.head.get_value() is model.embed.table.get_value()
    merged = merge(adapted)
    assert merged.cfg.tied_head == tied
    logits = gj.forward(adapted, tokens).logits
    np.testing.assert_allclose(gj.forward(merged, tokens).logits, logits, atol=ATOL)
    np.testing.assert_allclose(gj.loss(merged, tokens), gj.loss(adapted, tokens), rtol=1e-5)
    assert np.abs(logits - gj.forward(model, tokens).logits).max() > 0.1


def test_what_is_trained_whole():
    model, tokens = tiny.model(ALIKE), tiny.tokens(ALIKE, 2, 9)
    settings = Lora(rank=2, whole=("final_norm.scale", "*.pre_attn_norm.scale"))
    after, state, _ = run(model, settings, optax.sgd(0.1), [tokens])
    moved = {path for path in leaves(model) if path in state.trained}
    assert {path[-2] for path in moved} == {"final_norm", "pre_attn_norm"}
    for path in moved:
        assert np.any(leaves(after)[path] != leaves(model)[path])


def test_towers_have_adapters_where_they_are_named():
    cfg = tiny.gemma3(layers=2, vision=tiny.vision())
    model = tiny.model(cfg)
    by_ours = gj.lora(model, Lora(rank=2)).trained
    assert not [path for path in by_ours if path[0] == "vision"]
    by_peft = gj.lora(model, Lora(rank=2, target_modules=("q_proj", "fc1"))).trained
    towers = {path[-3:-2] for path in by_peft if path[0] == "vision"}
    assert towers == {("q",), ("up",)}
    no_tower = Lora(rank=2, target_modules=r".*language_model\..*q_proj")
    assert not [path for path in gj.lora(model, no_tower).trained if path[0] == "vision"]


def test_a_model_without_arrays_has_adapters_to_be_planned():
    settings = replace(UNEVEN, dora=True)
    trained, frozen, join = gj.lora(abstract_model(CFG), settings)
    expected = gj.lora(tiny.model(CFG), settings).trained
    assert {p: a.shape for p, a in trained.items()} == {p: a.shape for p, a in expected.items()}
    assert all(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves((trained, frozen)))
    tokens = jax.ShapeDtypeStruct((2, 9), jnp.int32)
    loss = jax.eval_shape(lambda t, f, b: next_token(join(t, f), b)[0], trained, frozen, tokens)
    assert loss.shape == ()


def test_wrong_settings_are_refused_in_a_line():
    model = tiny.model(CFG)
    for settings, message in (
        (Lora(targets=("blocks.*.attention.*",)), "'blocks.*.attention.*' means nothing"),
        (Lora(target_modules=("qproj",)), "target_modules 'qproj' means no linear map"),
        (Lora(target_modules="(["), "is no regular expression"),
        (Lora(targets=("embed.table",), layers=(0,)), "choose nothing to train"),
        (Lora(whole=("blocks.1.pre_attn_norm.scale",)), "lies in one array with"),
    ):
        with pytest.raises(ValueError) as error:
            gj.lora(model, settings)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="rank=0 must be positive"):
        Lora(rank=0)
    with pytest.raises(ValueError, match="has an adapter already"):
        gj.lora(filled(model), Lora(rank=2))
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge(model)
