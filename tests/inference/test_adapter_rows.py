"""Several adapters beside one model: each row of a batch gives what it gives with its own alone."""

import jax
import numpy as np
import pytest
import tiny
from marks import nightly
from training.test_lora import filled

import gemma_jax as gj
from gemma_jax.placement import shard
from gemma_jax.quantisation import quantise
from gemma_jax.sharding import INFERENCE, make_mesh
from gemma_jax.training.lora import Lora

ATOL = 2e-5  # ten times the rounding of float32 sums in another order; mistakes show at 0.1
CFG = tiny.gemma3(layers=3)
ADAPTERS = {  # other targets, ranks and kinds
    "attention": Lora(rank=2, targets=("blocks.*.attn.*",)),
    "down": Lora(rank=3, dora=True, targets=("blocks.*.ffn.down.w", "blocks.*.attn.q.w")),
}
EMBEDDINGS = {
    "tied": Lora(rank=2, targets=("embed.table",), tie_head=True),
    "apart": Lora(rank=3, targets=("embed.table", "blocks.*.attn.q.w")),
}


def held(model, settings):
    """The model with adapters, and with each alone."""
    alone = {name: filled(model, one, seed) for seed, (name, one) in enumerate(settings.items())}
    return gj.with_adapters(model, alone), alone | {None: model}


@pytest.mark.parametrize("settings", [ADAPTERS, *nightly(EMBEDDINGS)], ids=lambda s: min(s))
@pytest.mark.parametrize(
    "layout, lengths", [("unrolled", (3, 9, 14, 5)), *nightly(("scan", (3, 25, 17, 5)))]
)
def test_rows_write_what_each_writes_alone(settings, layout, lengths):
    """Prompts of unlike lengths, which are read in chunks and end in unlike places.

    One choice for all rows is what the adapter alone is (below).
    """
    model, alone = held(tiny.model(CFG, layout), settings)
    names = [*settings, None, min(settings)]
    prompts = [tiny.tokens(CFG, 1, n, seed=n)[0].tolist() for n in lengths]
    options = dict(max_new_tokens=8, chunk=16)
    mixed = gj.generate(gj.choose_adapters(model, names), None, prompts, **options)
    texts = set()
    for name in alone:
        wanted = gj.generate(gj.choose_adapters(model, name), None, prompts, **options)
        texts.add(str([done.token_ids for done in wanted]))
        for i in (i for i, one in enumerate(names) if one == name):
            assert mixed[i].token_ids == wanted[i].token_ids, name
            np.testing.assert_allclose(mixed[i].log_probs, wanted[i].log_probs, atol=ATOL)
    assert len(texts) == len(alone)  # the adapters matter


@pytest.mark.parametrize("cfg", [CFG, *nightly(tiny.gemma3n(4, 1))], ids=["gemma3", "gemma3n"])
def test_one_choice_for_all_rows_and_another_for_each(cfg):
    beside = ("per_layer.*", "streams.*") if cfg.per_layer else ()
    everything = Lora(rank=2, targets=("blocks.*", *beside))
    model, alone = held(tiny.model(cfg), {"all": everything, **ADAPTERS})
    tokens = tiny.tokens(cfg, 3, 9)
    for name, adapted in alone.items():
        logits = gj.forward(gj.choose_adapters(model, name), tokens).logits
        np.testing.assert_allclose(logits, gj.forward(adapted, tokens).logits, atol=ATOL)
    names = ["down", "all", "attention"]
    before = None
    for order in (names, names[::-1], [None, "all", None]):
        logits = gj.forward(gj.choose_adapters(model, order), tokens).logits
        for row, name in enumerate(order):
            wanted = gj.forward(alone[name], tokens).logits[row]
            np.testing.assert_allclose(logits[row], wanted, atol=ATOL)
        before = before or gj.forward._cache_size()
        assert gj.forward._cache_size() == before  # other choices, the same program


def test_over_whole_numbers_and_on_a_mesh():
    base = quantise(tiny.model(CFG), "int8")
    model, alone = held(base, ADAPTERS)
    tokens, names = tiny.tokens(CFG, 2, 9), ["down", "attention"]
    logits = gj.forward(gj.choose_adapters(model, names), tokens).logits
    for row, name in enumerate(names):
        wanted = gj.forward(alone[name], tokens).logits[row]
        np.testing.assert_allclose(logits[row], wanted, atol=ATOL)
    plain, _ = held(tiny.model(CFG), ADAPTERS)
    mesh = make_mesh(CFG, jax.devices()[:4], data=2, tensor=2)
    split = shard(gj.choose_adapters(plain, names), mesh, INFERENCE)
    whole = gj.forward(gj.choose_adapters(plain, names), tokens).logits
    np.testing.assert_allclose(gj.forward(split, tokens).logits, whole, atol=ATOL)


def test_folders_stand_beside_models(tmp_path):
    base = tiny.model(CFG)
    alone = {name: filled(base, one) for name, one in ADAPTERS.items()}
    folder = gj.save_adapter(alone["down"], tmp_path / "down", ADAPTERS["down"])
    model = gj.with_adapters(base, {"down": folder, "attention": alone["attention"]})
    tokens = tiny.tokens(CFG, 2, 5)
    logits = gj.forward(gj.choose_adapters(model, ["attention", "down"]), tokens).logits
    for row, name in enumerate(["attention", "down"]):
        wanted = gj.forward(alone[name], tokens).logits[row]
        np.testing.assert_allclose(logits[row], wanted, atol=ATOL)


def test_what_rows_cannot_have_is_refused():
    base = tiny.model(tiny.gemma3(layers=2, vision=tiny.vision()))
    settings = Lora(rank=2, target_modules=("q_proj",))
    model, _ = held(base, {"seeing": settings})
    gj.choose_adapters(model, "seeing")
    with pytest.raises(ValueError, match=r"vision\.tower\.blocks.* reads items rather than rows"):
        gj.choose_adapters(model, ["seeing", None])
    with pytest.raises(ValueError, match="no adapter 'other'; the model holds seeing"):
        gj.choose_adapters(model, "other")
    with pytest.raises(ValueError, match="the model holds no adapters"):
        gj.choose_adapters(base, None)
    with pytest.raises(ValueError, match="no adapters are given"):
        gj.with_adapters(base, {})
    text = tiny.model(CFG)
    model = gj.choose_adapters(held(text, ADAPTERS)[0], ["down", None])
    with pytest.raises(ValueError, match="2 adapters are chosen, but the batch has 3 rows"):
        gj.forward(model, tiny.tokens(CFG, 3, 5))
    other = filled(tiny.model(CFG, seed=3), ADAPTERS["down"])
    with pytest.raises(ValueError, match="the adapted model has another weight than this one"):
        gj.with_adapters(text, {"other": other})
