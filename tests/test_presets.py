"""Released sizes by their published numbers, without weights."""

import dataclasses

import jax
import pytest
import tiny
from flax import nnx

from gemma_jax import PRESETS, Gemma, cache_bytes, forward, preset
from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.segments import segment_layers

# Parameters of the text decoders, tied heads counted once (transformers `num_parameters()`).
PARAMETERS = {
    "gemma-2b": 2_506_172_416,
    "gemma-7b": 8_537_680_896,
    "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984,
    "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176,
    "gemma3-27b": 27_009_346_304,
}
GLOBAL_LAYERS = {
    "gemma3-270m": 3,
    "gemma3-1b": 4,
    "gemma3-4b": 5,
    "gemma3-12b": 8,
    "gemma3-27b": 10,
}


def abstract(cfg: GemmaConfig, layout="scan"):
    return jax.eval_shape(lambda: Gemma(cfg, rngs=nnx.Rngs(0), layout=layout))


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
@pytest.mark.parametrize("name", list(PRESETS))
def test_parameter_counts(name, layout):
    leaves = jax.tree.leaves(abstract(PRESETS[name], layout))
    assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


@pytest.mark.parametrize("name", list(GLOBAL_LAYERS))
def test_gemma3_layers(name):
    cfg = preset(name)
    kinds = [spec.kind for spec in cfg.layers]
    assert [i for i, kind in enumerate(kinds) if kind == "global"] == list(range(5, len(kinds), 6))
    assert kinds.count("global") == GLOBAL_LAYERS[name]
    small = name in ("gemma3-270m", "gemma3-1b")
    for spec in cfg.layers:
        if spec.kind == "local":
            assert (spec.rope_theta, spec.rope_scale) == (10_000, 1)
            assert spec.window == (512 if small else 1_024)
        else:
            assert (spec.rope_theta, spec.rope_scale) == (1_000_000, 1 if small else 8)
    assert cfg.max_positions == (32_768 if small else 131_072)


def test_query_scale_is_a_fact_of_its_own():
    """27B divides by sqrt(168) with heads of 128; no rule over the sizes gives all of these."""
    scalars = {name: cfg.query_pre_attn_scalar for name, cfg in PRESETS.items()}
    assert scalars.pop("gemma3-27b") == 168 and scalars.pop("gemma2-27b") == 144
    assert set(scalars.values()) == {256}


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_segments_flatten_to_the_layers(name, layout):
    specs = PRESETS[name].layers
    segments = segment_layers(specs, layout)
    flat = {
        seg.layer_index(p, r): spec
        for seg in segments
        for r in range(seg.repeats)
        for p, spec in enumerate(seg.period)
    }
    assert tuple(flat[i] for i in range(len(specs))) == specs
    if layout == "scan":  # compile time: a handful of blocks, however deep the model
        assert sum(len(seg.period) for seg in segments) <= 7


def test_irregular_layers_fall_into_segments_of_one():
    widths = [LayerSpec(kind="global", d_ff=n) for n in (8, 16, 24)]
    assert [seg.repeats for seg in segment_layers(tuple(widths))] == [1, 1, 1]


def test_local_layers_cost_a_window_not_the_context():
    cfg = preset("gemma3-27b")
    per_token = 2 * cfg.num_kv_heads * cfg.head_dim * 2
    expected = per_token * (10 * 131_072 + 52 * 1_024)
    assert cache_bytes(cfg, 1, 131_072, "bfloat16") == expected
    assert expected < 0.2 * per_token * 62 * 131_072


def test_every_config_field_matters():
    """Changing a field changes the parameters or the traced program: none is dead."""

    def trace(cfg):
        net = abstract(cfg)
        ids = jax.ShapeDtypeStruct((1, 12), "int32")
        return str(jax.make_jaxpr(lambda n, i: forward(n, i).logits)(net, ids)), str(
            jax.tree.map(lambda a: a.shape, net)
        )

    base = tiny.gemma3(layers=3)
    changes = dict(
        vocab_size=97, d_model=36, num_heads=8, num_kv_heads=1, head_dim=8,
        query_pre_attn_scalar=13, layers=base.layers[:2], norm_eps=1e-5, qk_norm=False,
        post_norms=False, attn_soft_cap=2.0, final_soft_cap=2.0,
    )  # fmt: skip
    fields = {f.name for f in dataclasses.fields(GemmaConfig)}
    assert fields == changes.keys() | {"max_positions"}  # bounds sequences; see test_generation
    before = trace(base)
    for name, value in changes.items():
        assert trace(dataclasses.replace(base, **{name: value})) != before, name
    local = dict(window=7, rope_theta=2e4, rope_scale=2.0, d_ff=40)
    assert {f.name for f in dataclasses.fields(LayerSpec)} == local.keys() | {"kind"}
    for name, value in local.items():
        spec = dataclasses.replace(base.layers[0], **{name: value})
        assert trace(dataclasses.replace(base, layers=(spec, *base.layers[1:]))) != before, name


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_kv_heads=3), "num_heads=4 must be a multiple of num_kv_heads=3"),
        (dict(head_dim=15), "head_dim=15 must be even"),
        (dict(d_model=0), "d_model=0 must be positive"),
        (dict(attn_soft_cap=-1.0), "attn_soft_cap=-1.0 must be positive"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.gemma3(**change)


def test_impossible_layers_are_refused():
    with pytest.raises(ValueError, match="at least one LayerSpec"):
        tiny.gemma3(layers=0)
    with pytest.raises(ValueError, match="a global layer cannot have window=4"):
        LayerSpec(kind="global", window=4, d_ff=8)
    with pytest.raises(ValueError, match="kind='sliding' must be 'local' or 'global'"):
        LayerSpec(kind="sliding", d_ff=8)


def test_unknown_preset_names_all():
    with pytest.raises(ValueError, match="unknown preset 'gemma3-3b'; choose one of: .*gemma3-4b"):
        preset("gemma3-3b")
