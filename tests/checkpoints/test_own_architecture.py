"""What is saved comes back as the model that it was, or is refused by its name."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from tiny_checkpoints import DATA, write_gguf

import gemma_checkpoints as gc
import gemma_jax as gj
from gemma_checkpoints.beside_config import beside_config
from gemma_jax.decoder.model import abstract_model
from gemma_jax.nn.ffn import FeedForward
from gemma_jax.weights.tree import flat_params, with_params

CFG = tiny.gemma3(layers=3)
IDS = tiny.tokens(CFG, 2, 9)


def logits(model) -> np.ndarray:
    return np.asarray(gj.forward(model, IDS).logits)


class Doubled(FeedForward):
    """Without parameters of its own: nothing but its name tells it from the usual one."""

    def __call__(self, x_BTD):
        return 2 * super().__call__(x_BTD)[0]


class DoubledBlock(gj.Block):
    def __init__(self, cfg, spec, *, rngs):
        super().__init__(cfg, spec, rngs=rngs)
        self.ffn = Doubled(cfg, spec, rngs=rngs)


class Mixed(nnx.Module):
    """With parameters of its own, and without letters."""

    def __init__(self, cfg, spec, *, rngs):
        self.mix = nnx.Linear(cfg.d_model, cfg.d_model, rngs=rngs)

    def __call__(self, x_BTD):
        return self.mix(x_BTD)


class MixedBlock(gj.Block):
    def __init__(self, cfg, spec, *, rngs):
        super().__init__(cfg, spec, rngs=rngs)
        self.ffn = Mixed(cfg, spec, rngs=rngs)


class Adapter(nnx.Module):
    def __init__(self, inner, a):
        self.inner, self.a = inner, nnx.Param(a)

    def __call__(self, x_BTD):
        return self.inner(x_BTD) + x_BTD @ self.a[...] @ jnp.ones_like(self.a[...]).T


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("save", [gc.save_hf, gc.save_orbax])
def test_activations_come_back(activation, save, tmp_path):
    model = tiny.model(replace(CFG, activation=activation))
    saved = save(model, tmp_path / "saved")
    again = gc.load_weights(saved)
    assert again.cfg == model.cfg and again.cfg.activation == activation
    assert np.array_equal(logits(again), logits(model))


def test_folders_older_than_activations(tmp_path):
    saved = gc.save_orbax(tiny.model(CFG), tmp_path / "saved")
    manifest = saved / "gemma_jax.json"
    old = json.loads(manifest.read_text())
    del old["config"]["activation"]
    manifest.write_text(json.dumps(old))
    assert gc.load_weights(saved).cfg == CFG


@pytest.mark.parametrize("block", [DoubledBlock, MixedBlock])
@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_blocks_of_ones_own_come_back_by_the_same_factory(block, layout, tmp_path):
    model = tiny.model(CFG, layout, block=block)
    saved = gc.save_orbax(model, tmp_path / "saved")
    other = {"scan": "unrolled", "unrolled": "scan"}[layout]
    again = gc.load_weights(saved, block=block, layout=layout)
    assert np.array_equal(logits(again), logits(model))
    restacked = gc.load_weights(saved, block=block, layout=other)
    np.testing.assert_allclose(logits(restacked), logits(model), atol=1e-5)


class Scaled(nnx.Module):
    """Of what it is made of, nothing has parameters."""

    def __init__(self, factor, gate, inner):
        self.factor, self.gate, self.inner = factor, gate, inner

    def __call__(self, x_BTD):
        return self.factor * self.gate(self.inner(x_BTD))


class Twice(nnx.Module):
    def __call__(self, x_BTD):
        return 2 * x_BTD


class Same(Twice):
    def __call__(self, x_BTD):
        return x_BTD


class ScaledBlock(gj.Block):
    def __init__(self, cfg, spec, *, rngs, factor=3.0, gate=jax.nn.silu, inner=Twice):
        super().__init__(cfg, spec, rngs=rngs)
        self.ffn = Scaled(factor, gate, inner())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(factor=4.0), "attribute blocks.0.ffn.factor is 3.0"),
        (dict(gate=jax.nn.relu), "attribute blocks.0.ffn.gate is jax.silu"),
        (dict(gate=lambda x: x), "attribute blocks.0.ffn.gate is jax.silu"),
        (dict(inner=Same), "blocks.0.ffn.inner is Twice"),
    ],
)
def test_what_a_block_is_made_with_is_compared(changes, message, tmp_path):
    block = partial(ScaledBlock, factor=3.0)
    saved = gc.save_orbax(tiny.model(CFG, block=block), tmp_path / "saved")
    assert gc.load_weights(saved, block=ScaledBlock).blocks[0][0].ffn.factor == 3
    with pytest.raises(gc.CheckpointError, match=message):
        gc.load_weights(saved, block=partial(ScaledBlock, **changes))


def halved(x, by=2):
    return x / by


def local(factor):
    def halved(x):
        return factor * x

    return halved


def in_a_sequence(gate):
    def block(cfg, spec, *, rngs):
        made = gj.Block(cfg, spec, rngs=rngs)
        made.ffn = nnx.Sequential(nnx.Linear(cfg.d_model, cfg.d_model, rngs=rngs), gate)
        return made

    return block


def test_functions_are_told_apart_by_where_they_lie(tmp_path):
    kept = [halved, jax.nn.silu, partial(halved, by=3), partial(halved, by=4)]
    folders = [
        gc.save_orbax(tiny.model(CFG, block=partial(ScaledBlock, gate=gate)), tmp_path / str(i))
        for i, gate in enumerate(kept)
    ]
    here = f"{halved.__module__}.halved"
    for said, folder in zip((here, "jax.silu", rf"partial\({here}\) with by=3", "by=4"), folders):
        with pytest.raises(gc.CheckpointError, match=rf"blocks.0.ffn.gate is .*{said}"):
            gc.load_weights(folder, block=partial(ScaledBlock, gate=jax.nn.relu))
    gc.load_weights(folders[2], block=partial(ScaledBlock, gate=partial(halved, by=3)))
    folder = gc.save_orbax(tiny.model(CFG, block=in_a_sequence(jax.nn.silu)), tmp_path / "list")
    gc.load_weights(folder, block=in_a_sequence(jax.nn.silu))
    with pytest.raises(gc.CheckpointError, match="attribute blocks.0.ffn.layers.1 is jax.silu"):
        gc.load_weights(folder, block=in_a_sequence(jax.nn.relu))


@pytest.mark.parametrize(
    "gate",
    [
        lambda x: 2 * x,
        local(2),
        partial(local(2)),
        jax.jit(local(2)),
        (1, local(2)),
        partial(halved, by=np.ones(2)),
        Twice().__call__,
    ],
)
def test_functions_without_a_name_are_refused_when_saved(gate, tmp_path):
    model = tiny.model(CFG, block=partial(ScaledBlock, gate=gate))
    with pytest.raises(gc.CheckpointError) as caught:
        gc.save_orbax(model, tmp_path / "saved")
    text = str(caught.value)
    assert "attribute blocks.0.ffn.gate is " in text and "\n" not in text
    assert "that no name tells from others" in text
    assert "defined at the top of a module, or make it a method of the class" in text
    assert not list(tmp_path.iterdir())
    with pytest.raises(gc.CheckpointError, match="blocks.0.ffn.layers.1 is a function that no"):
        gc.save_orbax(tiny.model(CFG, block=in_a_sequence(local(2))), tmp_path / "saved")


def test_blocks_of_ones_own_do_not_come_back_as_others(tmp_path):
    saved = gc.save_orbax(tiny.model(CFG, block=DoubledBlock), tmp_path / "doubled")
    message = r"blocks of its own \(blocks.0 is DoubledBlock, not Block \(and 2 more layers\); "
    for look in (gc.load_weights, gc.describe):
        with pytest.raises(gc.CheckpointError, match=message + r".*only Python can give.*load\("):
            look(saved)
    with pytest.raises(gc.CheckpointError, match="saved with other blocks than `block` makes"):
        gc.load_weights(saved, block=MixedBlock)
    plain = gc.save_orbax(tiny.model(CFG), tmp_path / "plain")
    with pytest.raises(gc.CheckpointError, match="other blocks .*; leave `block` out"):
        gc.load_weights(plain, block=DoubledBlock)


def test_other_formats_refuse_blocks_of_ones_own(tmp_path):
    model = tiny.model(CFG, block=MixedBlock)
    with pytest.raises(gc.CheckpointError) as caught:
        gc.save_hf(model, tmp_path / "hf")
    text = str(caught.value)
    assert "blocks.0.ffn is Mixed, not FeedForward (and 2 more layers): no config says" in text
    assert "parameter blocks.0.ffn.mix.kernel has no place in this format (and 2 more" in text
    assert not list(tmp_path.iterdir())


def changed_class(model, monkeypatch):
    monkeypatch.setattr("gemma_jax.decoder.model.FeedForward", Doubled)
    return tiny.model(replace(CFG, max_positions=511)), "blocks.0.ffn is Doubled"


def changed_code(model, monkeypatch):
    call = FeedForward.__call__
    monkeypatch.setattr(FeedForward, "__call__", lambda self, x, *more: call(self, 2 * x, *more))
    return model, "blocks.0.ffn is FeedForward with other code"


def wrapped(model, monkeypatch):
    block = model.blocks[0][0]
    block.pre_ffn_norm = Adapter(block.pre_ffn_norm, jnp.zeros((1, 32, 2)))
    return model, "parameter blocks.0.pre_ffn_norm.a has no place in this format.*merge it first"


def other_attribute(model, monkeypatch):
    model.blocks[0][0].attn.soft_cap = 50.0
    return model, "attribute blocks.0.attn.soft_cap is 50.0, not None: give another"


def other_config(model, monkeypatch):
    layers = tuple(replace(spec, rope_theta=5e3) for spec in CFG.layers)
    model.cfg = replace(CFG, layers=layers)
    return model, "attribute blocks.0.spec.rope_theta is 10000.0, not 5000.0"


def without_a_norm(model, monkeypatch):
    model.blocks[0][0].attn.q_norm = None
    return model, "attribute blocks.0.attn.q_norm is None, not RMSNorm: "


def with_state(model, monkeypatch):
    model.blocks[0][0].steps = nnx.BatchStat(jnp.zeros(1))
    return model, "blocks.0.steps is a BatchStat, and only parameters are saved"


@pytest.mark.parametrize(
    "change",
    [
        changed_class, changed_code, wrapped, other_attribute, other_config, without_a_norm,
        with_state,
    ],
)  # fmt: skip
@pytest.mark.parametrize("save", [gc.save_hf, gc.save_orbax])
def test_what_was_changed_later_is_refused(change, save, monkeypatch, tmp_path):
    model, message = change(tiny.model(CFG, "unrolled"), monkeypatch)
    with pytest.raises(gc.CheckpointError, match=message):
        save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*tiny.FAMILIES, "with a tower"])
def test_models_as_they_are_made_are_their_config(name):
    seer = tiny.gemma3(2, vision=tiny.vision())
    cfg = tiny.FAMILIES[name]() if name in tiny.FAMILIES else seer
    assert not beside_config(tiny.model(cfg, "unrolled"))


def test_models_that_went_through_something_are_their_config():
    assert not beside_config(gj.Gemma(CFG, rngs=nnx.Rngs(0)))
    assert not beside_config(tiny.model(replace(CFG, origin="gemma3_text")))
    trained, frozen, join = gj.trainable(tiny.model(CFG))
    assert not beside_config(join(trained, frozen))
    elastic = tiny.model(tiny.gemma3n(4, 1), "unrolled")
    half = gj.matformer.Slice(ffn_widths=(24,) * 4)
    assert not beside_config(gj.matformer.slice(elastic, half))


def test_without_qk_norm_it_is_said_what_is_missing(tmp_path):
    """Gemma 2 has none either, but one rope for all layers."""
    model = tiny.model(replace(CFG, qk_norm=False))
    with pytest.raises(gc.CheckpointError) as caught:
        gc.save_hf(model, tmp_path / "hf")
    assert str(caught.value).endswith(
        "cannot be exported: without QK norm this is no Gemma 3 of transformers, whose Gemma 2 and "
        "VaultGemma have one rope for all layers; save_orbax keeps it"
    )
    assert np.array_equal(
        logits(gc.load_weights(gc.save_orbax(model, tmp_path / "ours"))), logits(model)
    )


@pytest.fixture(scope="module", params=["hf", "orbax", "gguf"])
def stored(request, tmp_path_factory):
    """The same model in every format."""
    folder, model = tmp_path_factory.mktemp(request.param), tiny.model(CFG)
    if request.param == "gguf":
        return write_gguf(folder / "x.gguf", model, "gemma3", lambda name, array: (array, None))
    save = {"hf": gc.save_hf, "orbax": gc.save_orbax}[request.param]
    return save(model, folder / "saved")


def wider(cfg):
    layers = (replace(s, window=s.window and 4, rope_theta=2e4) for s in cfg.layers)
    return replace(cfg, layers=tuple(layers))


def test_windows_and_rope_change_when_loaded(stored):
    again = gc.load_weights(stored, config=wider)
    assert again.cfg == wider(gc.open_source(stored).config)
    arrays = {path: p.get_value() for path, p in flat_params(gc.load_weights(stored)).items()}
    expected = with_params(abstract_model(again.cfg), arrays)
    assert np.array_equal(logits(again), logits(expected))


def test_last_layers_are_left_out_when_loaded(stored):
    def two(cfg):
        return replace(cfg, layers=cfg.layers[:2])

    whole = gj.forward(gc.load_weights(stored), IDS, capture=("layer_outputs",))
    again = gj.forward(gc.load_weights(stored, config=two), IDS, capture=("layer_outputs",))
    two_of_three = whole.captured["layer_outputs"][:2]
    np.testing.assert_allclose(again.captured["layer_outputs"], two_of_three, atol=1e-5)


def test_layers_may_become_of_another_kind(tmp_path):
    def all_global(cfg):
        wide = dict(kind="global", window=None)
        return replace(cfg, layers=[replace(spec, **wide) for spec in cfg.layers])

    saved = gc.save_orbax(tiny.model(CFG), tmp_path / "saved")
    model = gc.load_weights(saved, config=all_global)
    assert {spec.kind for spec in model.cfg.layers} == {"global"}


@pytest.mark.parametrize("kept", [slice(1, None), slice(None, None, 2), slice(None, None, -1)])
def test_other_layers_than_the_last_cannot_be_left_out(kept, tmp_path):
    """Their weights are those of the first layers, and would be taken for the others'."""
    saved = gc.save_orbax(tiny.model(CFG), tmp_path / "saved")
    message = r"makes layer \d (local|global) with its own keys and values, the checkpoint's is "
    with pytest.raises(gc.CheckpointError, match=message + ".* leave out last layers only$"):
        gc.load_weights(saved, config=lambda cfg: replace(cfg, layers=cfg.layers[kept]))


def test_layers_that_share_keys_and_values_are_no_others(tmp_path):
    saved = gc.save_orbax(tiny.model(tiny.gemma3n()), tmp_path / "saved")
    with pytest.raises(gc.CheckpointError, match="shared keys and values, the checkpoint's is"):
        gc.load_weights(saved, config=lambda c: replace(c, layers=c.layers[3:]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda c: dict(layers=c.layers * 2), "has 6 layers, the checkpoint has 3; change what"),
        (lambda c: dict(d_model=16), r"makes blocks.0.attn.k.w \[2, 16, 16\], the checkpoint has"),
        (lambda c: dict(vocab_size=90), r"makes embed.table \[90, 32\], the checkpoint has \[96"),
        (lambda c: dict(qk_norm=False), r"has no place for blocks.0.attn.k_norm.scale.* \(and 5 "),
        (lambda c: dict(laurel_rank=2), "asks for blocks.0.laurel.left.w, which the checkpoint"),
        (lambda c: dict(tied_head=False), "asks for embed.head, which the checkpoint does not"),
        (lambda c: dict(vision=tiny.vision()), "asks for vision.projector.norm.scale"),
        (
            lambda c: dict(layers=tuple(replace(s, d_ff=40) for s in c.layers)),
            r"makes blocks.0.ffn.down.w \[32, 40\], the checkpoint has \[32, 48\] \(and 8 more\)",
        ),
    ],
)
def test_a_config_for_other_weights_is_refused_in_one_line(changes, message, stored):
    with pytest.raises(gc.CheckpointError, match="the changed config " + message) as caught:
        gc.load_weights(stored, config=lambda cfg: replace(cfg, **changes(cfg)))
    assert "\n" not in str(caught.value)


def test_a_config_must_be_returned(stored):
    with pytest.raises(ValueError, match="config must return a GemmaConfig, got NoneType"):
        gc.load_weights(stored, config=lambda cfg: None)


def test_the_short_way_takes_configs_and_blocks():
    digits = str(DATA.parent.parent.parent / "checkpoints" / "digits")
    model = gj.load_model(digits, config=wider, block=DoubledBlock, modalities=("text",))
    assert {spec.window for spec in model.cfg.layers} == {None, 4}
    assert isinstance(model.blocks[0][0].ffn, Doubled)
    with pytest.raises(gc.CheckpointError) as caught:
        gj.load(digits, block=MixedBlock)
    _, kernel = caught.value.problems
    assert kernel.startswith("blocks.0.ffn.mix.kernel: the model has such a parameter")
    assert "none (and 2 more layers); make it by Gemma(cfg, block=...) and copy into" in kernel


class WithScale(gj.Block):
    def __init__(self, cfg, spec, *, rngs):
        super().__init__(cfg, spec, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(cfg.d_model))


def test_what_was_loaded_is_copied_into_blocks_with_more_parameters():
    """As the refusal says."""
    plain = tiny.model(CFG)
    more = tiny.model(CFG, block=WithScale, seed=1)
    nnx.update(more, nnx.state(plain, nnx.Param))
    np.testing.assert_array_equal(logits(more), logits(plain))
    other = tiny.model(CFG, block=MixedBlock)
    nnx.update(other, nnx.state(plain, nnx.All(nnx.Param, nnx.Not(nnx.PathContains("ffn")))))
    np.testing.assert_array_equal(other.embed.table, plain.embed.table)
