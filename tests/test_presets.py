"""Released sizes by their published numbers, without weights."""

import dataclasses
import json
from functools import partial

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from gemma_jax import PRESETS, cache_bytes, forward, preset
from gemma_jax.audio.encoder import AudioEncoder
from gemma_jax.config import (
    AltUpConfig,
    GemmaConfig,
    LayerSpec,
    ModalityVocabulary,
    PerLayerConfig,
    share_kv,
)
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.model import abstract_model
from gemma_jax.encoder_config import ImageProcessing, MobileNetConfig, VisionConfig
from gemma_jax.multimodal.placeholders import soft_tokens
from gemma_jax.nn.layer_groups import group_layers
from gemma_jax.presets import TINY, USM_CONFORMER
from gemma_jax.text_embedding_config import TextEmbeddingConfig

# Parameters of the decoders, tied heads counted once, as transformers counts them.
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
    "embeddinggemma-300m": 302_863_104 + 4_718_592,  # `Gemma3TextModel`, and two dense layers
    "gemma3n-e2b": 4_435_182_688,
    "gemma3n-e4b": 6_835_235_568,
    # `Gemma4ForCausalLM(...).parameters()` of transformers 5.24, and a scale per layer, which is a
    # buffer there.
    "gemma4-e2b": 4_628_569_344 + 35,
    "gemma4-e4b": 7_463_013_376 + 42,
}
# Published counts of Gemma 3n hold keys and values of layers that never use them; the effective
# ones leave both tables of embeddings out.
GEMMA3N_TOTAL = {"gemma3n-e2b": 4_456_156_768, "gemma3n-e4b": 6_866_696_688}
# Of the files with all that sees and hears: MobileNetV5 (timm 1.0.31), conformer and both embedders
# (`Gemma3nForConditionalGeneration` of transformers 5.24, which makes no keys and values for layers
# that share others': 7,818,517,072 in the larger one, as here).
GEMMA3N_PARTS = {"vision": 294_126_912, "audio": 681_348_640, "embedders": 4_460_544 + 3_345_408}
GEMMA3N_WHOLE = {"gemma3n-e2b": 5_439_438_272, "gemma3n-e4b": 7_849_978_192}
GEMMA3N_EFFECTIVE = {"gemma3n-e2b": 1_905_495_648, "gemma3n-e4b": 3_980_491_248}
# The same of what makes a model see: the tower, which all have in common, and the projector.
TOWER = 416_866_032
AUDIO_TOWER = 681_348_640
PROJECTOR = {"gemma3-4b": 2_950_272, "gemma3-12b": 4_424_832, "gemma3-27b": 6_194_304}
GLOBAL_LAYERS = {
    "gemma3-270m": 3,
    "gemma3-1b": 4,
    "gemma3-4b": 5,
    "gemma3-12b": 8,
    "gemma3-27b": 10,
}


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
@pytest.mark.parametrize("name", list(PRESETS))
def test_parameter_counts(name, layout):
    model = abstract_model(PRESETS[name], layout=layout)
    towers = count([model.vision, model.audio, model.modality_embedders])
    assert count(model) - towers == PARAMETERS[name]
    sees_and_hears = name in GEMMA3N_TOTAL
    assert (model.vision is not None) == (name in PROJECTOR or sees_and_hears)
    assert (model.audio is not None) == sees_and_hears
    if name in PROJECTOR:
        assert count(model.vision.tower) == TOWER
        assert count(model.vision.projector) == PROJECTOR[name]


@pytest.mark.parametrize("name", list(GEMMA3N_TOTAL))
def test_gemma3n_counts_as_published(name):
    cfg = preset(name)
    model = abstract_model(cfg)
    unused_by_layer = 2 * cfg.num_kv_heads * cfg.head_dim * cfg.d_model + cfg.head_dim
    whole = count(model) + unused_by_layer * sum(spec.kv == "shared" for spec in cfg.layers)
    parts = dict(vision=model.vision, audio=model.audio, embedders=model.modality_embedders)
    assert whole == GEMMA3N_WHOLE[name]
    assert {part: count(tree) for part, tree in parts.items()} == GEMMA3N_PARTS
    total = whole - sum(GEMMA3N_PARTS.values())
    assert total == GEMMA3N_TOTAL[name]
    tables = count(model.embed) + count(model.per_layer.table)
    assert total - tables == GEMMA3N_EFFECTIVE[name]


def test_gemma3n_layers():
    for name, depth in (("gemma3n-e2b", 30), ("gemma3n-e4b", 35)):
        layers = preset(name).layers
        assert [i for i, s in enumerate(layers) if s.kind == "global"] == list(range(4, depth, 5))
        assert [i for i, spec in enumerate(layers) if spec.kv == "lent"] == [18, 19]
        assert [i for i, spec in enumerate(layers) if spec.kv == "shared"] == list(range(20, depth))
        assert [i for i, spec in enumerate(layers) if spec.sparsity] == list(range(10))


def test_gemma3n_caches_are_rings_of_the_layers_that_own_keys():
    # 16 local layers of 512 slots and 4 global ones; a slot holds two heads of keys and values.
    expected = 2 * 2 * 256 * 2 * (16 * 512 + 4 * 32_768)
    assert cache_bytes(preset("gemma3n-e4b"), 1, 32_768, "bfloat16") == expected


def test_gemma4_layers_and_their_heads():
    for name, period, shared, widths in (
        ("gemma4-e2b", 5, 20, (6_144, 12_288)),
        ("gemma4-e4b", 6, 18, (10_240, 10_240)),
    ):
        cfg, depth = preset(name), len(preset(name).layers)
        wide = [i for i, spec in enumerate(cfg.layers) if spec.kind == "global"]
        assert wide == list(range(period - 1, depth, period))
        assert {cfg.heads_of(cfg.layers[i])[0] for i in wide} == {512}
        assert {cfg.layers[i].rotary_share for i in wide} == {0.25}
        assert [spec.d_ff for spec in cfg.layers] == [widths[0]] * (depth - shared) + [
            widths[1]
        ] * shared
    # Of E2B 12 local layers of 512 slots and 3 global ones have caches, of one head each.
    expected = 2 * 2 * (12 * 512 * 256 + 3 * 131_072 * 512)
    assert cache_bytes(preset("gemma4-e2b"), 1, 131_072, "bfloat16") == expected


def test_the_tower_by_hand():
    """SigLIP So400m: 27 layers of four square matrices and two wide ones, with biases."""
    C, F, Q, pixels = 1_152, 4_304, 64 * 64, 3 * 14 * 14
    layer = 4 * (C * C + C) + (C * F + F) + (F * C + C) + 2 * 2 * C
    assert TOWER == (pixels * C + C) + Q * C + 27 * layer + 2 * C
    for name, size in PROJECTOR.items():
        assert size == C + C * preset(name).d_model
    vision = preset("gemma3-4b").vision
    assert vision == preset("gemma3-12b").vision == preset("gemma3-27b").vision
    assert (vision.grid, vision.pooled, vision.num_soft_tokens) == (64, 16, 256)
    # <image_soft_token>, <start_of_image>, <end_of_image>
    assert (vision.image_token, vision.start_token, vision.end_token) == (262_144, 255_999, 256_000)


def test_the_audio_tower_has_as_many_parameters_as_transformers():
    """The sum over `Gemma3nAudioEncoder(Gemma3nAudioConfig()).parameters()`, and by hand."""
    tower = jax.eval_shape(
        lambda: AudioEncoder(USM_CONFORMER, rngs=nnx.Rngs(0), layout="scan")
    ).tower
    assert count(tower) == AUDIO_TOWER
    C, F, H = 1_536, 4 * 1_536, 192
    feed_forward = 2 * C * F + 2 * C
    attention = 5 * C * C + H + 2 * C
    convolution = 2 * C * C + 5 * C + C * C + 2 * C
    front = (128 * 9 + 128) + (32 * 128 * 9 + 32) + C * 32 * 32
    assert count(tower) == front + 12 * (2 * feed_forward + attention + convolution + C)


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
    assert scalars.pop("gemma3n-e2b") == scalars.pop("gemma3n-e4b") == 1
    assert scalars.pop("gemma4-e2b") == scalars.pop("gemma4-e4b") == 1
    assert set(scalars.values()) == {256}


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_segments_flatten_to_the_layers(name, layout):
    specs = PRESETS[name].layers
    layer_groups = group_layers(specs, layout)
    flat = {
        seg.layer_index(p, r): spec
        for seg in layer_groups
        for r in range(seg.repeats)
        for p, spec in enumerate(seg.period)
    }
    assert tuple(flat[i] for i in range(len(specs))) == specs
    if layout == "scan":  # compile time: a handful of blocks, however deep the model
        # In Gemma 3n sparse layers, lenders and sharers are kinds of their own.
        bound = {"gemma3n": 15, "gemma4-": 19}.get(name[:7], 7)
        assert sum(len(seg.period) for seg in layer_groups) <= bound


def test_irregular_layers_fall_into_segments_of_one():
    widths = [LayerSpec(kind="global", d_ff=n) for n in (8, 16, 24)]
    assert [seg.repeats for seg in group_layers(tuple(widths))] == [1, 1, 1]


def test_local_layers_cost_a_window_not_the_context():
    cfg = preset("gemma3-27b")
    per_token = 2 * cfg.num_kv_heads * cfg.head_dim * 2
    expected = per_token * (10 * 131_072 + 52 * 1_024)
    assert cache_bytes(cfg, 1, 131_072, "bfloat16") == expected
    assert expected < 0.2 * per_token * 62 * 131_072


def test_every_config_field_matters():
    """Changing a field changes the parameters or the traced program: none is dead."""

    def run(model, ids):
        inputs, vision, audio = {}, model.cfg.vision, model.cfg.audio
        if vision is not None:
            inputs["image"] = jax.numpy.zeros((1, 3, vision.image_size, vision.image_size))
        if audio is not None:
            inputs["audio"] = jax.numpy.zeros((1, 40, audio.num_mels))
        soft = soft_tokens(model, ids, inputs) if inputs else None
        return forward(model, Batch(ids, soft=soft)).logits

    def trace(cfg):
        model = abstract_model(cfg)
        ids = jax.ShapeDtypeStruct((1, 12), "int32")
        return str(jax.make_jaxpr(run)(model, ids)), str(jax.tree.map(lambda a: a.shape, model))

    def check(make, changes):
        before = trace(make())
        for name, value in changes.items():
            assert trace(make(**{name: value})) != before, name

    base = tiny.gemma3(2, every=2)
    changes = dict(
        vocab_size=97, d_model=36, num_heads=8, num_kv_heads=1, head_dim=8,
        query_pre_attn_scalar=13, layers=base.layers[:1], norm_eps=1e-5, qk_norm=False,
        post_norms=False, activation="silu", attn_soft_cap=2.0, final_soft_cap=2.0,
        vision=tiny.vision(), scale_plus_one=False, v_norm=True, tied_head=False,
        altup=AltUpConfig(num_streams=2), laurel_rank=3,
        per_layer=PerLayerConfig(width=4, vocab_size=90),
        modality_vocabularies=(ModalityVocabulary(first_id=90, vocab_size=4, width=5),),
        bidirectional=True, text_embedding=TextEmbeddingConfig(dense=(5,)),
    )  # fmt: skip
    fields = {f.name for f in dataclasses.fields(GemmaConfig)}
    # The first bounds sequences (test_generation), the second is for other numerics (test_gemma3n),
    # the third for files, the last needs a vocabulary of its own and is below.
    assert fields == changes.keys() | {"max_positions", "optional_final_cap", "origin", "audio"}
    check(partial(dataclasses.replace, base), changes)

    def with_layer(**change):
        spec, *others = base.layers
        return dataclasses.replace(base, layers=(dataclasses.replace(spec, **change), *others))

    local = dict(
        window=7, rope_theta=2e4, rope_scale=2.0, d_ff=40, sparsity=0.5, head_dim=8,
        num_kv_heads=1, rotary_share=0.5, values="keys",
        sub_blocks=("attention", "ffn", "layer_scale"),
    )  # fmt: skip
    assert {f.name for f in dataclasses.fields(LayerSpec)} == local.keys() | {"kind", "kv"}
    check(with_layer, local)
    deep = tiny.gemma3(layers=6)
    check(partial(dataclasses.replace, deep), dict(layers=share_kv(deep.layers, 2)))

    def streams(**change):
        return dataclasses.replace(base, altup=AltUpConfig(**change))

    check(streams, dict(num_streams=3, active=1))

    def seeing(**change):
        return dataclasses.replace(base, vision=tiny.vision(**change))

    tower = dict(
        d_tower=26, d_ff=44, num_layers=3, num_heads=4, image_size=28, patch_size=7,
        num_soft_tokens=16, image_token=89, norm_eps=1e-5,
    )  # fmt: skip
    fields = {f.name for f in dataclasses.fields(VisionConfig)}
    # The last are for prompts, and for the pixels that the tower is given.
    assert fields == tower.keys() | {"start_token", "end_token", "images"}
    check(seeing, tower)

    def hearing(**change):
        return tiny.seeing_and_hearing(base, vision=None, audio=tiny.audio(**change))

    assert trace(hearing()) != trace(dataclasses.replace(hearing(), audio=None))
    # The tower's own fields are in audio/test_audio_config.py.
    check(hearing, dict(num_soft_tokens=7, audio_token=96))

    def glancing(**change):
        return tiny.seeing_and_hearing(base, vision=tiny.mobilenet(**change), audio=None)

    stages = tiny.mobilenet().stages
    tower = dict(
        d_stem=12, stages=(*stages[:2], stages[2] * 2, *stages[3:]), image_size=128,
        num_soft_tokens=1, image_token=92, fusion_expansion=3.0, norm_eps=1e-5,
    )  # fmt: skip
    fields = {f.name for f in dataclasses.fields(MobileNetConfig)}
    assert fields == tower.keys() | {"d_tower", "start_token", "end_token", "images"}
    check(glancing, tower)


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


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_heads=5), "d_tower=24 must be a multiple of num_heads=5"),
        (dict(image_size=57), "image_size=57 must be a multiple of patch_size=14"),
        (dict(num_soft_tokens=5), "num_soft_tokens=5 must be a square whose side divides the 4"),
        (dict(num_soft_tokens=9), "num_soft_tokens=9 must be a square whose side divides the 4"),
        (dict(num_layers=0), "num_layers=0 must be positive"),
        (dict(norm_eps=0.0), "norm_eps=0.0 must be positive"),
    ],
)
def test_impossible_towers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tiny.vision(**change)


def test_impossible_layers_are_refused():
    with pytest.raises(ValueError, match="at least one LayerSpec"):
        tiny.gemma3(layers=0)
    with pytest.raises(ValueError, match="a global layer cannot have window=4"):
        LayerSpec(kind="global", window=4, d_ff=8)
    with pytest.raises(ValueError, match="kind='sliding' must be 'local' or 'global'"):
        LayerSpec(kind="sliding", d_ff=8)
    for field, value, message in (
        ("head_dim", 0, "head_dim=0 must be positive"),
        ("rotary_share", 0.0, r"rotary_share=0.0 must lie in \(0, 1\]"),
        ("values", "queries", "values='queries' must be 'own' or 'keys'"),
        ("sub_blocks", ("ffn", "attention"), "must be .*'attention', 'ffn'.*in this order"),
        ("sub_blocks", ("attention", "moe"), r"sub_blocks\[1\]='moe' must be 'attention', 'ffn'"),
    ):
        with pytest.raises(ValueError, match=message):
            LayerSpec(kind="global", d_ff=8, **{field: value})


def test_layers_that_do_not_fit_the_model_are_refused():
    cfg = tiny.gemma3(layers=6)

    def first(**change):
        changed = dataclasses.replace(cfg.layers[0], **change)
        return dataclasses.replace(cfg, layers=(changed, *cfg.layers[1:]))

    assert first(head_dim=8).heads_of(first(head_dim=8).layers[0]) == (8, 2)
    with pytest.raises(ValueError, match="head_dim=7 must be even"):
        first(head_dim=7)
    with pytest.raises(ValueError, match="num_heads=4 must be a multiple of num_kv_heads=3"):
        first(num_kv_heads=3)
    with pytest.raises(ValueError, match="sub_blocks name per_layer, but the model has no such"):
        first(sub_blocks=("attention", "ffn", "per_layer"))
    *others, last = share_kv(cfg.layers, 2)
    with pytest.raises(ValueError, match=r"are \(8, 2\), of what is lent \(16, 2\)"):
        dataclasses.replace(cfg, layers=(*others, dataclasses.replace(last, head_dim=8)))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(d_model=64.5), "d_model must be an integer, got 64.5"),
        (dict(vocab_size="10"), "vocab_size must be an integer, got '10'"),
        (dict(num_heads=None), "num_heads must be an integer, got None"),
        (dict(head_dim=True), "head_dim must be an integer, got True"),
        (dict(norm_eps="1e-6"), "norm_eps must be a number, got '1e-6'"),
        (dict(attn_soft_cap="50"), "attn_soft_cap must be a number or None, got '50'"),
        (dict(laurel_rank=4.0), "laurel_rank must be an integer or None, got 4.0"),
        (dict(qk_norm="no"), "qk_norm must be True or False, got 'no'"),
        (dict(post_norms=1), "post_norms must be True or False, got 1"),
        (dict(activation="swish"), "activation='swish' must be 'gelu_tanh', 'gelu', 'silu' or"),
        (dict(origin=3), "origin must be a string or None, got 3"),
        (dict(layers=3), "layers must be a tuple of LayerSpec, got 3"),
        (dict(layers=["local"]), r"layers\[0\] must be a LayerSpec, got 'local'"),
        (dict(altup={"num_streams": 2}), "altup must be an AltUpConfig or None, got {'num_"),
        (
            dict(vision=tiny.gemma3()),
            "vision must be a VisionConfig or a MobileNetConfig or None, got GemmaConfig",
        ),
    ],
)
def test_wrong_types_are_refused(change, message):
    with pytest.raises(ValueError, match="^" + message):
        dataclasses.replace(tiny.gemma3(), **change)


@pytest.mark.parametrize(
    "kind, fields, message",
    [
        (LayerSpec, dict(kind="local", window=2.5, d_ff=8), "window must be an integer or None"),
        (LayerSpec, dict(kind="global", d_ff=[8]), r"d_ff must be an integer, got \[8\]"),
        (LayerSpec, dict(kind=None, d_ff=8), "kind=None must be 'local' or 'global'"),
        (AltUpConfig, dict(num_streams="4"), "num_streams must be an integer, got '4'"),
        (PerLayerConfig, dict(width=8, vocab_size=9e3), "vocab_size must be an integer, got 9000"),
        (ModalityVocabulary, dict(first_id=None, vocab_size=1, width=2), "first_id must be an"),
        (ImageProcessing, dict(mean=(0.5, "x", 0.5)), r"mean\[1\] must be a number, got 'x'"),
        (ImageProcessing, dict(mean=0.5), "mean must be a tuple of float, got 0.5"),
    ],
)
def test_wrong_types_in_the_parts_are_refused(kind, fields, message):
    with pytest.raises(ValueError, match="^" + message):
        kind(**fields)
    with pytest.raises(ValueError, match="^image_size must be an integer, got 56.0"):
        tiny.vision(image_size=56.0)


def test_configs_are_plain_data_whatever_they_are_made_of():
    """They are hashed, compared and written as JSON."""
    plain = tiny.gemma3()
    sizes = dict(d_model=np.int64(32), norm_eps=np.float64(1e-6), query_pre_attn_scalar=np.int8(12))
    same = dataclasses.replace(plain, layers=list(plain.layers), **sizes)
    assert same == plain and hash(same) == hash(plain)
    assert json.dumps(dataclasses.asdict(same)) == json.dumps(dataclasses.asdict(plain))


@pytest.mark.parametrize("name", list(TINY))
def test_tiny_models_have_what_their_generation_has(name):
    """All fields that the released sizes switch on but the towers, and all kinds of layers."""

    def features(cfg: GemmaConfig) -> set:
        kinds = {(spec.kind, spec.kv) for spec in cfg.layers}
        return (
            kinds
            | {spec.sparsity > 0 for spec in cfg.layers}
            | {f.name for f in dataclasses.fields(cfg) if getattr(cfg, f.name)}
        )

    tiny, generation = preset(name), name.removeprefix("tiny-")
    released = [cfg for key, cfg in PRESETS.items() if key.startswith(f"{generation}-")]
    towers = {"vision", "audio", "modality_vocabularies"}
    assert released and all(features(tiny) == features(cfg) - towers for cfg in released)
    assert sum(x.size for x in jax.tree.leaves(abstract_model(tiny))) < 1_000_000


def test_unknown_preset_names_all():
    with pytest.raises(ValueError, match="unknown preset 'gemma3-3b'; choose one of: .*gemma3-4b"):
        preset("gemma3-3b")
