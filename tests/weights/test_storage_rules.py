"""Which matrix is stored as what: one name for all, or patterns of names."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import gemma_jax as gj
from gemma_jax import forward
from gemma_jax.quantisation import quantise, store_weights
from gemma_jax.weights.protocol import dense
from gemma_jax.weights.quantized import QuantizedWeight


@pytest.fixture(scope="module")
def model():
    return tiny.whole_groups("unrolled")


def kinds(model):
    blocks = model.blocks[0]
    found = {"embed": model.embed.table, "q": blocks[0].attn.q.w, "down": blocks[1].ffn.down.w}
    return {name: type(p.get_value()).__name__ for name, p in found.items()} | {
        name: p.get_value().matrix.bits
        for name, p in found.items()
        if isinstance(p.get_value(), QuantizedWeight)
    }


def test_the_first_pattern_that_fits_decides(model):
    small = quantise(model, {"blocks.1.ffn.*": "int8", "*.ffn.*": "int4", "embed.*": "bfloat16"})
    assert kinds(small) == {"embed": "StoredWeight", "q": "ArrayImpl", "down": 8}
    assert small.blocks[0][0].ffn.up.w.get_value().matrix.bits == 4
    assert isinstance(small.final_norm.scale.get_value(), jax.Array)
    assert kinds(quantise(small, "int4")) == {"embed": 4, "q": 4, "down": 4}


@pytest.mark.parametrize(
    "storage, message",
    [
        ("int3", "storage='int3' must be 'float32', 'bfloat16', 'int8', "),
        ("stored", "storage='stored' must be "),
        ({"*": "q4_0"}, "storage='q4_0' must be "),
        (
            {"head.*": "int8"},
            r"pattern 'head\.\*' decides on no matrix: none is called so, or an",
        ),
        ({"*": "int8", "embed.*": "int4"}, r"pattern 'embed\.\*' decides on no matrix"),
        (
            {"*.scale": "int8"},
            r"'\*\.scale' decides on no matrix.* names are such as blocks\.0",
        ),
    ],
)
def test_rules_that_cannot_be_kept(model, storage, message):
    with pytest.raises(ValueError, match=message) as error:
        quantise(model, storage)
    assert "\n" not in str(error.value)


def test_groups_that_do_not_divide_the_inputs_are_refused_by_name():
    model = tiny.model(tiny.gemma3(3))  # 48 channels
    with pytest.raises(ValueError) as error:
        quantise(model, "int4")
    assert str(error.value).startswith(
        "blocks.0.ffn.down.w has 48 inputs, which groups of 32 (int4) do not divide; give it "
        'another storage, as in {"blocks.0.ffn.down.w": "int8", "*": "int4"}'
    )
    mixed = quantise(model, {"*.ffn.down.w": "int8", "*": "int4"})
    assert mixed.blocks[0][0].ffn.down.w.get_value().matrix.bits == 8


def test_layers_that_share_an_array_share_a_storage():
    with pytest.raises(ValueError, match=r'blocks\.\d\..* lie in one array.*layout="unrolled"'):
        quantise(tiny.whole_groups("scan"), {"blocks.0.*": "int8", "*": "int4"})


def test_one_name_for_all_keeps_towers_and_streams_per_channel():
    """Nothing divides the inputs of a patch, and streams are four."""
    cfg = tiny.gemma3n(3, 0)
    layers = tuple(replace(spec, d_ff=64) for spec in cfg.layers)
    cfg = replace(cfg, layers=layers, laurel_rank=32, per_layer=replace(cfg.per_layer, width=32))
    small = quantise(tiny.model(cfg), "int4")
    block = small.blocks[0][0]
    assert block.altup.router.w.get_value().matrix.bits == 8
    assert block.ffn.up.w.get_value().matrix.bits == 4
    seeing = tiny.whole_groups(vision=tiny.vision())
    tower = quantise(seeing, "int4:64").vision.tower
    assert tower.patches.proj.w.get_value().matrix.bits == 8


def test_the_report_says_what_each_matrix_loses(model):
    rules = {"embed.*": "int8", "blocks.1.*": "int4:64", "*.ffn.*": "bfloat16"}
    errors = gj.quantisation_errors(model, rules)
    small = quantise(model, rules)
    for name, param in (
        ("embed.table", lambda m: m.embed.table),
        ("blocks.1.ffn.down.w", lambda m: m.blocks[0][1].ffn.down.w),
        ("blocks.2.ffn.up.w", lambda m: m.blocks[0][2].ffn.up.w),
    ):
        wide, found = (np.asarray(dense(param(m).get_value())) for m in (model, small))
        error = np.abs(found - wide)
        assert errors[name].largest == pytest.approx(error.max(), rel=1e-5)
        assert errors[name].relative == pytest.approx(
            np.sqrt(np.mean(error**2) / np.mean(wide**2)), rel=1e-4
        )
    assert "blocks.0.attn.q.w" not in errors
    bits = {e.storage: e.bits_per_weight for e in errors.values()}
    assert bits == {"int8": 8.5, "int4:64": 4.5, "bfloat16": 16}
    stacked = gj.quantisation_errors(tiny.whole_groups("scan"), "int8")
    assert {"blocks.0.attn.q.w", "blocks.1.attn.q.w", "blocks.2.attn.q.w"} <= stacked.keys()


def test_errors_are_found_before_anything_is_read():
    abstract = jax.eval_shape(lambda: tiny.model(tiny.gemma3(3)))
    with pytest.raises(ValueError, match="has 48 inputs"):
        store_weights("int4")(abstract)


def test_activations_of_whole_numbers(model):
    """The option goes into every product, and moves the numbers a little."""
    plain, rounded = (quantise(model, "int8", activations=a) for a in ("float", "int8"))
    tokens = tiny.tokens(model.cfg, 1, 9)
    ours, theirs = (forward(m, tokens).logits for m in (rounded, plain))
    assert 0 < float(jnp.abs(ours - theirs).mean()) < 0.05
    with pytest.raises(ValueError, match="activations='int4' must be 'float' or 'int8'"):
        quantise(model, "int8", activations="int4")


def test_quantised_weights_are_not_trained(model):
    with pytest.raises(ValueError, match=r"QuantizedWeight .*\.w has no gradient"):
        gj.trainable(quantise(model, "int4"))
