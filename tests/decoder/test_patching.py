"""A patch changes what it names, and everything after it as if the layers had made it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.tree_util import Partial

import gemma_jax as gj
from gemma_jax.decoder.patching import DIMS, OF_NO_LAYER, PATCHES
from gemma_jax.placement import empty_cache

FAMILIES = {"gemma3": tiny.gemma3(4, every=2), "gemma3n": tiny.gemma3n(4, 1)}
ALL = slice(None)
B, T, D = 2, 6, 32


def names_of(cfg) -> tuple[str, ...]:
    """What such a model can patch."""
    alone = ("laurel", "altup", "per_layer")
    return tuple(name for name in PATCHES if cfg.altup or not name.startswith(alone))


@pytest.fixture(scope="module", params=list(FAMILIES))
def cfg(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(cfg):
    return tiny.model(cfg)


@pytest.fixture(scope="module")
def ids(cfg):
    return tiny.tokens(cfg, B, T)


@pytest.fixture(scope="module")
def clean(cfg, model, ids):
    return gj.forward(model, ids, capture=names_of(cfg))


def itself(name: str, captured) -> dict:
    """A patch that assigns to all layers and tokens what they have."""
    value = captured[name]
    if name == "per_layer_inputs":
        value = jnp.moveaxis(value, 2, 0)
    return {name: (None if name in OF_NO_LAYER else ALL, ALL, value)}


def test_what_is_put_back_changes_no_bit(cfg, model, ids, clean):
    patch = {}
    for name in names_of(cfg):
        patch |= itself(name, clean.captured)
    weights = {"attention_weights": patch.pop("attention_weights")}
    out = gj.forward(model, ids, patch=patch)
    np.testing.assert_array_equal(out.logits, clean.logits)
    out = gj.forward(model, ids, patch=weights)  # sums in another order than attention's
    np.testing.assert_allclose(out.logits, clean.logits, atol=2e-5)


def test_without_a_patch_the_program_is_the_same(model, ids):
    texts = [
        gj.forward.lower(model, ids, **given).as_text()
        for given in ({}, {"patch": None}, {"patch": {}})
    ]
    assert texts[0] == texts[1] == texts[2]
    patch = {"layer_outputs": (0, 0, np.zeros(D))}
    assert gj.forward.lower(model, ids, patch=patch).as_text() != texts[0]


def test_all_positions_of_another_run_give_its_logits(cfg, model, ids):
    other = gj.forward(model, ids[:, ::-1], capture="layer_outputs")
    for layer in (1, -1):
        value = other.captured["layer_outputs"][layer]
        out = gj.forward(model, ids, patch={"layer_outputs": (layer, ALL, value)})
        if cfg.altup and layer == 1:  # later layers read per-layer inputs of their own tokens
            assert not np.allclose(out.logits, other.logits, atol=1e-3)
            continue
        np.testing.assert_array_equal(out.logits, other.logits)


def test_layouts_and_places_give_the_same(cfg, ids, clean):
    random = np.random.default_rng(0)
    scan = tiny.model(cfg)
    unrolled = tiny.relayout(scan, "unrolled")
    names = ("altup_mixtures", "per_layer_inputs") if cfg.altup else ("ffn_outputs", "final_norm")
    for name in names:
        layer = None if name in OF_NO_LAYER else [0, -2]
        last = clean.captured[name].shape[-1]
        patch = {name: (layer, [1, -1], random.normal(size=last).astype(np.float32))}
        outs = [gj.forward(m, ids, patch=patch, capture=name) for m in (scan, unrolled)]
        np.testing.assert_allclose(outs[0].logits, outs[1].logits, atol=1e-4, err_msg=name)
        assert float(jnp.abs(outs[0].logits - clean.logits).max()) > 1e-4, name
        got = outs[0].captured[name]
        if name == "per_layer_inputs":
            got = jnp.moveaxis(got, 2, 0)
        got = got if layer is None else got[jnp.array(layer)]
        after = len(DIMS[name]) - DIMS[name].index("T") - 1
        some = jnp.take(got, jnp.array([1, T - 1]), axis=-after - 1)
        np.testing.assert_array_equal(some, jnp.broadcast_to(patch[name][2], some.shape))


def test_a_layer_by_hand():
    """Gemma 3's last layer: the head reads what is assigned, and the stream where nothing is."""
    cfg = FAMILIES["gemma3"]
    model, ids = tiny.model(cfg), tiny.tokens(FAMILIES["gemma3"], B, T)
    clean = gj.forward(model, ids, capture=("layer_outputs", "attention_outputs", "ffn_outputs"))
    value = np.random.default_rng(1).normal(size=(B, D)).astype(np.float32)
    out = gj.forward(model, ids, patch={"ffn_outputs": (-1, 2, value)}, capture="layer_outputs")
    got = {name: np.array(array) for name, array in clean.captured.items()}
    expected = got["layer_outputs"]
    expected[-1, :, 2] = expected[-2, :, 2] + got["attention_outputs"][-1, :, 2] + value
    np.testing.assert_allclose(out.captured["layer_outputs"], expected, atol=1e-5)
    x = expected[-1]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps)
    x = x * (1 + np.asarray(model.final_norm.scale[...]))
    logits = x @ np.asarray(model.embed.table[...]).T
    np.testing.assert_allclose(out.logits, logits, atol=2e-4)


def test_values_of_every_shape(model, ids, clean):
    streams = clean.captured["layer_outputs"].shape[1:-3]
    random = np.random.default_rng(2)
    for position, axes in ((3, ()), (slice(2, 4), (2,)), (np.array([0, 5]), (2,))):
        for shape in {(D,), (*streams, B, *axes, D)}:
            value = random.normal(size=shape).astype(np.float32)
            patch = {"layer_outputs": (1, position, value)}
            out = gj.forward(model, ids, patch=patch, capture="layer_outputs").captured
            expected = np.array(clean.captured["layer_outputs"])[1]
            expected[..., position, :] = value
            np.testing.assert_allclose(out["layer_outputs"][1], expected, atol=1e-5)


def test_functions(model, ids, clean):
    doubled = {"attention_outputs": lambda layer, x: jnp.where(layer == 1, 2 * x, x)}
    plain = clean.captured["attention_outputs"][1]
    by_hand = {"attention_outputs": (1, ALL, 2 * plain)}
    outs = [gj.forward(model, ids, patch=patch).logits for patch in (doubled, by_hand)]
    np.testing.assert_allclose(*outs, atol=1e-5)
    many = {"final_norm": [lambda layer, x: x * 2, (None, 0, np.zeros(D))]}
    out = gj.forward(model, ids, patch=many, capture="final_norm").captured["final_norm"]
    np.testing.assert_allclose(out[:, 1:], 2 * clean.captured["final_norm"][:, 1:], atol=1e-5)
    assert not out[:, 0].any()


def test_one_program_for_all_places_and_leaves(model, ids):
    def scaled(factor, layer, x):
        return factor * x

    before = gj.forward._cache_size()
    for layer, position, factor in ((0, 1, 2.0), (2, -1, 3.0)):
        value = np.full(D, factor, np.float32)
        patch = {"layer_outputs": (layer, position, value), "ffn_outputs": Partial(scaled, factor)}
        gj.forward(model, ids, patch=patch)
    assert gj.forward._cache_size() == before + 1


def test_traced_layers_and_positions(model, ids, clean):
    source = gj.forward(model, ids[:, ::-1], capture="layer_outputs").captured["layer_outputs"]

    @jax.jit
    @jax.vmap
    def traced(layer, position):
        value = jnp.take(source[layer], position, axis=-2)
        return gj.forward(model, ids, patch={"layer_outputs": (layer, position, value)}).logits

    places = [(0, 2), (2, -1)]
    found = traced(*map(jnp.array, zip(*places)))
    for logits, (layer, position) in zip(found, places):
        patch = {"layer_outputs": (layer, position, source[layer][..., position, :])}
        np.testing.assert_allclose(logits, gj.forward(model, ids, patch=patch).logits, atol=1e-5)


def test_gradients_through_a_patch(model, ids, clean):
    value = clean.captured["layer_outputs"][1][..., 2, :]

    def assigned(value):
        patch = {"layer_outputs": (1, 2, value)}
        return (gj.forward(model, ids, patch=patch).logits ** 2).mean()

    def called(change):
        add = lambda layer, x: x + jnp.where(layer == 1, change, 0)  # noqa: E731
        return (gj.forward(model, ids, patch={"layer_outputs": add}).logits ** 2).mean()

    slope = jax.grad(assigned)(value)
    everywhere = jax.grad(called)(jnp.zeros_like(clean.captured["layer_outputs"][1]))
    np.testing.assert_allclose(slope, everywhere[..., 2, :], atol=1e-6, rtol=1e-4)
    step = jax.random.normal(jax.random.key(0), value.shape)
    numeric = (assigned(value + 1e-2 * step) - assigned(value - 1e-2 * step)) / 2e-2
    if not model.cfg.altup:  # sparse layers bend too often
        np.testing.assert_allclose((slope * step).sum(), numeric, rtol=2e-2)


def test_attention_is_knocked_out(model, ids):
    """No weight on the first token: its keys and values might as well be others."""

    def blind(layer, weights_BNTS):
        weights_BNTS = weights_BNTS.at[:, :, 1:, 0].set(0)
        return weights_BNTS / weights_BNTS.sum(-1, keepdims=True)

    changed = ids.copy()
    changed[:, 0] = (ids[:, 0] + 1) % 90 + 3
    patch = {"attention_weights": blind}
    one, other = (gj.forward(model, i, patch=patch).logits for i in (ids, changed))
    np.testing.assert_allclose(one[:, 1:], other[:, 1:], atol=1e-5)
    assert float(jnp.abs(one[:, 0] - other[:, 0]).max()) > 1e-3


def test_with_a_cache(model, ids):
    """A patched pass over part of a text, and one after it without a patch."""
    value = np.linspace(-1, 1, D, dtype=np.float32)
    patch = {"layer_outputs": (1, 1, value)}
    whole = gj.forward(model, ids, patch=patch).logits
    cache = empty_cache(model, B, T)
    first = gj.forward(model, ids[:, :3], cache=cache, patch=patch)
    second = gj.forward(model, ids[:, 3:], cache=first.cache)
    found = np.concatenate([first.logits, second.logits], axis=1)
    np.testing.assert_allclose(found, whole, atol=2e-5)
    last = gj.forward(model, ids, patch=patch, logits="last").logits
    np.testing.assert_allclose(last[:, 0], whole[:, -1], atol=2e-5)


WRONG = {
    r"cannot patch \['layers'\]; choose from embeddings, ": {"layers": (0, 0, 0)},
    "cannot patch .*read off, not used": {"sparsity_masks": (0, 0, 0)},
    r"layer 9 is outside \[-4, 4\): there are 4 layers": {"layer_outputs": (9, 0, 0)},
    r"position -7 is outside \[-6, 6\): there are 6 tokens": {"layer_outputs": (0, -7, 0)},
    "a position is given twice": {"layer_outputs": (0, [0, -6], 0)},
    "the layer must be None, for it belongs to no layer": {"final_norm": (0, 0, 0)},
    "the layer must be given; got None": {"laurel": (None, 0, 0)},
    "the layer must be an integer, several or": {"laurel": (0.5, 0, 0)},
    "the position must be an integer, several or a slice of at": {"laurel": (0, slice(0, 0), 0)},
    "expected .layer, position, value., a function, or a list of such; got 2 entries": {
        "laurel": (0, 0)
    },
    "got str": {"laurel": "zero"},
    "the value is no array": {"laurel": (0, 0, "zero")},
    r"shape \[5\] does not fit \[A, B, D\] = \[3, 2, 32\]": {"layer_outputs": (0, 0, np.zeros(5))},
    r"shape \[3, 32\] does not fit \[B, T, D\] = \[2, 2, 32\]": {
        "laurel": (0, [0, 1], np.zeros((3, D)))
    },
    r"must return an array of shape \[2, 6, 32\]; got NoneType": {"laurel": lambda layer, x: None},
    "patch must be a dict by name, got tuple": (0, 0, 0),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused(message):
    cfg = FAMILIES["gemma3n"]
    with pytest.raises(ValueError, match=message):
        gj.forward(tiny.model(cfg), tiny.tokens(cfg, B, T), patch=WRONG[message])


def test_parts_that_a_model_has_not():
    cfg = FAMILIES["gemma3"]
    with pytest.raises(ValueError, match="no part whose laurel could be patched"):
        gj.forward(tiny.model(cfg), tiny.tokens(cfg, B, T), patch={"laurel": (0, 0, 0)})


def test_kernels_have_no_weights_to_patch():
    cfg = FAMILIES["gemma3"]
    model = tiny.model(cfg, attention_impl="tpu")
    with pytest.raises(ValueError, match="'tpu' has no attention_weights to patch; take one of"):
        gj.forward(model, tiny.tokens(cfg, B, T), patch={"attention_weights": (0, 0, 0)})
