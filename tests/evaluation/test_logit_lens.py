"""What is read off layers: the model's own head, by hand, in blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from intermediates import largest_intermediate

import gemma_jax as gj
from gemma_jax.decoder.forward import unembed
from gemma_jax.evaluation import logit_lens as lens_module
from gemma_jax.evaluation.contributions import _parts

CONFIGS = {
    "gemma3": tiny.gemma3(2, every=2),
    "gemma2": tiny.gemma2(),
    "gemma3n": tiny.gemma3n(4, 1),
    "gemma4": tiny.gemma4(),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request):
    return tiny.model(CONFIGS[request.param])


def test_the_last_layer_is_the_model(model):
    ids = tiny.tokens(model.cfg, 2, 7)
    lens = gj.logit_lens(model, ids, top_k=3, logits=True)
    out = gj.forward(model, ids, capture="layer_outputs")
    np.testing.assert_array_equal(lens.logits_LBTV[-1], out.logits)
    assert float(jnp.abs(lens.kl_LBT[-1]).max()) < 1e-5
    first = unembed(model, out.captured["layer_outputs"][0])
    np.testing.assert_allclose(lens.logits_LBTV[0], first, atol=1e-5)
    assert float(jnp.abs(first - out.logits).max()) > 0.1


def test_numbers_by_hand(model):
    ids = tiny.tokens(model.cfg, 2, 7)
    lens = gj.logit_lens(model, ids, top_k=3, logits=True)
    log_probs = np.asarray(jax.nn.log_softmax(lens.logits_LBTV), np.float64)
    order = np.argsort(-log_probs, axis=-1, kind="stable")
    np.testing.assert_array_equal(lens.ids_LBTX, order[..., :3])
    best = np.take_along_axis(log_probs, order[..., :3], -1)
    np.testing.assert_allclose(lens.probs_LBTX, np.exp(best), rtol=1e-4)
    kl = (np.exp(log_probs[-1]) * (log_probs[-1] - log_probs)).sum(-1)
    np.testing.assert_allclose(lens.kl_LBT, kl, atol=1e-4)
    for row, column in ((0, 0), (1, 5)):
        after = ids[row, column + 1]
        given = log_probs[:, row, column, after]
        np.testing.assert_allclose(lens.next_log_probs_LBT[:, row, column], given, atol=1e-4)
        ranks = (order[:, row, column] == after).argmax(-1)
        np.testing.assert_array_equal(lens.next_ranks_LBT[:, row, column], ranks)
    assert np.isnan(lens.next_log_probs_LBT[..., -1]).all()
    assert (np.asarray(lens.next_ranks_LBT[..., -1]) == -1).all()


def test_blocks_change_nothing(monkeypatch):
    cfg = CONFIGS["gemma3n"]
    model, ids = tiny.model(cfg), tiny.tokens(cfg, 2, 7)
    whole = gj.logit_lens(model, ids)
    monkeypatch.setattr(lens_module, "BLOCK", 3)
    jax.clear_caches()
    blocks = gj.logit_lens(model, ids)
    jax.clear_caches()
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(blocks)):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_all_logits_never_exist():
    cfg = tiny.gemma3(2, every=2, vocab_size=8192)  # more than attention holds
    model, ids = tiny.model(cfg), tiny.tokens(cfg, 1, 4 * lens_module.BLOCK)
    largest = largest_intermediate(lambda ids: gj.logit_lens(model, ids).kl_LBT, ids)
    assert largest == lens_module.BLOCK * cfg.vocab_size


def test_padding_has_no_next_token():
    cfg = CONFIGS["gemma3"]
    rows = [row.tolist() for row in tiny.tokens(cfg, 2, 6)]
    batch = gj.Batch.padded([rows[0], rows[1][:3]], 6)
    lens = gj.logit_lens(tiny.model(cfg), batch)
    alone = gj.logit_lens(tiny.model(cfg), [rows[1][:3]])
    np.testing.assert_allclose(lens.kl_LBT[:, 1, :3], alone.kl_LBT[:, 0], atol=1e-5)
    assert (np.asarray(lens.next_ranks_LBT[:, 1, 2:]) == -1).all()


def test_what_patches_change_is_read():
    cfg = CONFIGS["gemma3"]
    model, ids = tiny.model(cfg), tiny.tokens(cfg, 1, 5)
    patch = {"layer_outputs": (0, -1, np.ones(cfg.d_model, np.float32))}
    lens = gj.logit_lens(model, ids, logits=True, patch=patch)
    np.testing.assert_array_equal(lens.logits_LBTV[-1], gj.forward(model, ids, patch=patch).logits)


def test_wrong_numbers_of_choices():
    cfg = CONFIGS["gemma3"]
    for top_k in (0, 97):
        with pytest.raises(ValueError, match=rf"top_k={top_k} must lie in \[1, 96\]"):
            gj.logit_lens(tiny.model(cfg), [[2, 3]], top_k=top_k)


def test_contributions_add_up(model):
    ids = tiny.tokens(model.cfg, 2, 5)
    parts = gj.contributions(model, ids)
    names = ["inputs_embeds", "layer_outputs"]
    names += ["altup_predictions"] if model.cfg.altup else []
    names += ["per_layer_outputs"] if model.cfg.per_layer else []
    names += ["attention_outputs", "ffn_outputs"]
    captured = gj.forward(model, ids, capture=names).captured
    arrays = _parts(model, captured)
    assert list(arrays) == list(parts)
    after = captured["layer_outputs"]
    np.testing.assert_allclose(sum(arrays.values()), after, atol=2e-4)
    for name, array in arrays.items():
        norms = np.sqrt((np.asarray(array) ** 2).sum(-1))
        np.testing.assert_allclose(parts[name], norms, rtol=1e-4, atol=1e-4)
        assert parts[name].shape == after.shape[:-1]
    if model.cfg.altup:
        assert not parts["per_layer"][:, 0].any() and parts["per_layer"][:, 1:].all()


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "gemma4"])
def test_a_logit_is_the_sum_of_what_is_added_to_it(family):
    """Oracle: `forward`; the cap of Gemma 2 is undone, as its logit is what parts add up to."""
    cfg = CONFIGS[family]
    model, ids = tiny.model(cfg), tiny.tokens(cfg, 2, 7)
    logits = np.asarray(gj.forward(model, ids).logits, np.float64)
    if model.soft_cap is not None:
        logits = model.soft_cap * np.arctanh(logits / model.soft_cap)
    for position in (-1, 3):
        parts = gj.logit_contributions(model, ids, 5, position=position)
        by_layer = ["attention", "ffn", *(["per_layer"] if cfg.per_layer else [])]
        shapes = {"embedding": (2,)} | dict.fromkeys(by_layer, (len(cfg.layers), 2))
        assert {n: p.shape for n, p in parts.items()} == shapes
        total = parts["embedding"] + sum(parts[name].sum(0) for name in by_layer)
        np.testing.assert_allclose(total, logits[:, position, 5], atol=2e-5)
        other = gj.logit_contributions(model, ids, 7, position=position)
        between = gj.logit_contributions(model, ids, 5, against=7, position=position)
        for name in parts:
            np.testing.assert_allclose(between[name], parts[name] - other[name], atol=1e-5)


def test_each_part_is_added_where_it_is_said():
    """By hand, one part of one layer in float64."""
    cfg = CONFIGS["gemma3"]
    model, ids = tiny.model(cfg), tiny.tokens(cfg, 1, 5)
    names = ("layer_outputs", "attention_outputs", "ffn_outputs")
    found = gj.forward(model, ids, capture=names).captured
    x = np.asarray(found["layer_outputs"][-1, 0, -1], np.float64)
    gain = (1 + np.asarray(model.final_norm.scale[...])) / np.sqrt((x**2).mean() + cfg.norm_eps)
    parts = gj.logit_contributions(model, ids, 11)
    for name in ("attention", "ffn"):
        for layer in range(len(cfg.layers)):
            part = np.asarray(found[f"{name}_outputs"][layer, 0, -1], np.float64)
            by_hand = (part * gain) @ np.asarray(model.embed.table[...])[11]
            np.testing.assert_allclose(parts[name][layer, 0], by_hand, atol=1e-5)


def test_logits_that_are_not_split():
    model = tiny.model(CONFIGS["gemma3"])
    for wrong, message in (
        ({"token": 96}, r"token=96 must lie in \[0, 96\)"),
        ({"token": 0, "against": -1}, r"against=-1 must lie in \[0, 96\)"),
        ({"token": 0, "position": 2}, r"position=2 must lie in \[-2, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            gj.logit_contributions(model, [[2, 3]], **wrong)
    with pytest.raises(ValueError, match="no sum over layers"):
        gj.logit_contributions(tiny.model(CONFIGS["gemma3n"]), [[2, 3]], 0)
    both_ways = tiny.model(tiny.gemma3(1, bidirectional=True))
    with pytest.raises(ValueError, match="no next token whose logit could be split"):
        gj.logit_contributions(both_ways, [[2, 3]], 0)
