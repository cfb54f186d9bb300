"""How a model is loaded is one value, given as it is or field by field."""

import dataclasses
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_imports import ROOT

import gemma_jax as gj
from gemma_jax.loading import LoadKeywords
from gemma_jax.weights.protocol import dense
from gemma_jax.weights.quantized import QuantizedWeight

DIGITS = str(ROOT / "checkpoints" / "digits")
ELASTIC = str(ROOT / "checkpoints" / "elastic")
GGUF_Q4_0 = str(ROOT / "tests" / "parity" / "data" / "quant" / "g3_q4_0.gguf")


def test_editors_see_the_fields_as_keywords():
    keywords = typing.get_type_hints(LoadKeywords)
    fields = {field.name: field.type for field in dataclasses.fields(gj.LoadOptions)}
    assert keywords == fields
    for function in (gj.load, gj.load_model):
        annotation = inspect.signature(function).parameters["changes"].annotation
        assert annotation == typing.Unpack[LoadKeywords]


def test_keywords_change_what_the_options_say():
    options = gj.LoadOptions(dtype="bfloat16", cache_dtype="int8", modalities=("text",))
    runtime = gj.load_model(DIGITS, options, dtype="float32").runtime
    assert (runtime.dtype, runtime.kv_dtype) == (jnp.float32, jnp.int8)


def test_nothing_is_read_for_options_that_do_not_go_together():
    with pytest.raises(ValueError, match="weights='int3' must be 'float32', 'bfloat16', 'int8', "):
        gj.load("nothing", weights="int3")
    with pytest.raises(ValueError, match="weights='q4' must be"):
        gj.load("nothing", weights={"embed.*": "int8", "*": "q4"})
    with pytest.raises(ValueError, match="weights='stored' is for all matrices"):
        gj.load("nothing", weights={"embed.*": "stored"})
    for weights in (None, "bfloat16", {"*": "float32"}):
        with pytest.raises(ValueError, match="activations='int8' is for quantised weights; give"):
            gj.load("nothing", activations="int8", weights=weights)
    with pytest.raises(ValueError, match="numerics='tf' must be one of: hf, gdm"):
        gj.load("nothing", numerics="tf")
    with pytest.raises(ValueError, match="per_layer_table='host' is for one device"):
        gj.load("nothing", per_layer_table="host", mesh={"tensor": 8})
    with pytest.raises(TypeError, match="load has no argument 'wieghts'; did you mean weights?"):
        gj.load("nothing", wieghts="int8")


Q4_0 = ROOT / "tests" / "parity" / "data" / "quant" / "g3_q4_0.gguf"


def test_blocks_of_a_file_stay_as_they_are():
    """The same logits as of the widened file, to the rounding of float32 sums."""
    tokens = np.arange(12)[None] + 5
    wide = gj.load_model(str(Q4_0))
    kept = gj.load_model(str(Q4_0), weights="stored")
    weight = kept.blocks[0][0].ffn.up.w.get_value()
    assert (weight.matrix.bits, weight.matrix.group, weight.activations) == (4, 32, "float")
    assert weight.matrix.scale.dtype == jnp.float16
    expected = gj.forward(wide, tokens).logits
    np.testing.assert_allclose(gj.forward(kept, tokens).logits, expected, atol=5e-5)
    whole = gj.load_model(str(Q4_0), weights="stored", activations="int8")
    error = np.abs(gj.forward(whole, tokens).logits - expected)
    assert 0 < error.mean() < 0.05 * np.std(expected)


def test_rules_by_name_while_loading():
    rules = {"embed.*": "int8", "*.ffn.*": "int4:32", "vision.*": "bfloat16"}
    small = gj.load_model(DIGITS, weights=rules)
    kinds = [p.get_value() for p in (small.embed.table, small.blocks[0][0].ffn.up.w)]
    assert [kind.matrix.bits for kind in kinds] == [8, 4]
    assert isinstance(small.blocks[0][0].attn.q.w.get_value(), jax.Array)
    with pytest.raises(ValueError, match="the pattern 'tower.*' decides on no matrix"):
        gj.load_model(DIGITS, weights={"tower.*": "int8"})


@pytest.mark.parametrize("source, stays", [(GGUF_Q4_0, True), (ELASTIC, False)])
def test_auto_keeps_blocks_where_there_are_some(source, stays):
    auto, plain = (gj.load_model(source, weights=weights) for weights in ("auto", None))
    weight = auto.blocks[0][0].ffn.up.w.get_value()
    assert isinstance(weight, QuantizedWeight) == stays
    assert not isinstance(plain.blocks[0][0].ffn.up.w.get_value(), QuantizedWeight)
    np.testing.assert_array_equal(dense(weight), plain.blocks[0][0].ffn.up.w.get_value())


def test_auto_is_for_all_matrices_and_not_for_what_has_no_blocks():
    with pytest.raises(ValueError, match="weights='auto' is for all matrices"):
        gj.LoadOptions(weights={"*": "auto"})
    with pytest.raises(ValueError, match="has no quantised blocks"):
        gj.load_model(ELASTIC, weights="auto", activations="int8")
