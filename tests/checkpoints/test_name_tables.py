"""Tables are bijections, checked from names and shapes alone: no weights."""

from dataclasses import replace

import numpy as np
import pytest

from gemma_checkpoints.gguf.names import gguf_table
from gemma_checkpoints.hf.names import hf_table, published_name, short_name
from gemma_checkpoints.name_table import Row, dropped, expand
from gemma_checkpoints.params import depths, named_slots
from gemma_checkpoints.rearrange import Rearrange, shape
from gemma_jax.decoder.model import abstract_model
from gemma_jax.presets import PRESETS

# The reader refuses the architecture; of the last, llama.cpp has one of its own.
NOT_AS_GGUF = (
    "gemma3n-e2b", "gemma3n-e4b", "embeddinggemma-300m", "gemma4-e2b", "gemma4-e4b"
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "table"),
    [(name, hf_table) for name in PRESETS]
    + [(name, gguf_table) for name in PRESETS if name not in NOT_AS_GGUF],
)
def test_every_parameter_has_exactly_one_row(name, table):
    cfg = PRESETS[name]
    if table is gguf_table:  # such files hold the decoder alone
        cfg = replace(cfg, vision=None)
    slots = named_slots(abstract_model(cfg, layout="scan"))
    rows = expand(table(cfg), depths(cfg))
    assert rows.keys() == slots.keys()
    assert len({row.theirs for row in rows.values()}) == len(rows)
    for ours, row in rows.items():
        if row.parsed is not None:
            assert "".join(row.parsed.right) == slots[ours].dims, "the pattern ends in our axes"


DECODER_LAYER = """
    input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm
    self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj
    self_attn.q_norm self_attn.k_norm mlp.gate_proj mlp.up_proj mlp.down_proj
""".split()
TOWER_LAYER = """
    layer_norm1 layer_norm2 mlp.fc1 mlp.fc2
    self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj
""".split()


def test_names_of_a_published_model_that_sees():
    """All that transformers writes for the 4B."""
    decoder, tower = "language_model.model.", "vision_tower.vision_model."
    expected = {
        decoder + "embed_tokens.weight",
        decoder + "norm.weight",
        tower + "embeddings.patch_embedding.weight",
        tower + "embeddings.patch_embedding.bias",
        tower + "embeddings.position_embedding.weight",
        tower + "post_layernorm.weight",
        tower + "post_layernorm.bias",
        "multi_modal_projector.mm_input_projection_weight",
        "multi_modal_projector.mm_soft_emb_norm.weight",
    }
    expected |= {f"{decoder}layers.{i}.{name}.weight" for i in range(34) for name in DECODER_LAYER}
    expected |= {
        f"{tower}encoder.layers.{i}.{name}.{kind}"
        for i in range(27)
        for name in TOWER_LAYER
        for kind in ("weight", "bias")
    }
    cfg = PRESETS["gemma3-4b"]
    rows = expand(hf_table(cfg), depths(cfg)).values()
    assert {published_name(row.theirs, cfg) for row in rows} == expected
    assert len(rows) == len(expected) == 883


@pytest.mark.parametrize("sees", [True, False])
def test_published_names_are_shortened_again(sees):
    cfg = PRESETS["gemma3-4b"] if sees else PRESETS["gemma3-1b"]
    for row in expand(hf_table(cfg), depths(cfg)).values():
        assert short_name(published_name(row.theirs, cfg)) == row.theirs


# Of published files, of transformers in memory, of ShieldGemma 2; bare decoders have none.
SPELLINGS = {
    "layers.0.mlp.up_proj.weight": """
        model. language_model.model. model.language_model. language_model.
        model.language_model.model. model.model.language_model.model. model.model.language_model.
    """,
    "vision_tower.post_layernorm.bias": """
        vision_tower.vision_model. vision_tower. model.vision_tower.vision_model.
        model.vision_tower. model.model.vision_tower.vision_model. model.model.vision_tower.
    """,
    "multi_modal_projector.mm_soft_emb_norm.weight": """
        multi_modal_projector. model.multi_modal_projector. model.model.multi_modal_projector.
    """,
    "lm_head.weight": "language_model. model.",
}


@pytest.mark.parametrize("short", SPELLINGS)
def test_prefixes_of_all_times(short):
    inside = short.removeprefix("vision_tower.").removeprefix("multi_modal_projector.")
    assert {short_name(prefix + inside) for prefix in SPELLINGS[short].split()} == {short}
    assert short_name(short) == short


def test_names_do_not_depend_on_the_layout():
    cfg = replace(PRESETS["gemma3-270m"], vision=PRESETS["gemma3-4b"].vision)
    scan, unrolled = (named_slots(abstract_model(cfg, layout=l)) for l in ("scan", "unrolled"))
    assert {n: (s.dims, s.shape) for n, s in scan.items()} == {
        n: (s.dims, s.shape) for n, s in unrolled.items()
    }


def test_gemma_1_calls_the_norm_before_the_ffn_post_attention():
    theirs = "layers.0.post_attention_layernorm.weight"
    for name, ours in (("gemma-2b", "pre_ffn_norm"), ("gemma2-2b", "post_attn_norm")):
        table = hf_table(PRESETS[name])
        assert expand(table, {"blocks": 1})[f"blocks.0.{ours}.scale"].theirs == theirs


def test_a_name_in_two_rows_is_refused():
    with pytest.raises(ValueError, match="two rows"):
        expand((Row("a", "x"), Row("b", "x")), {})


def test_every_stack_has_its_own_depth():
    table = (Row("a.{i}.w", "x.{i}"), Row("b.c.{i}.w", "y.{i}"), Row("d", "z"))
    assert list(expand(table, {"a": 1, "b.c": 2})) == ["a.0.w", "b.c.0.w", "b.c.1.w", "d"]


def test_dropping_needs_a_reason():
    with pytest.raises(ValueError, match="says why"):
        Row(None, "x")
    names = ["layers.0.self_attn.rotary_emb.inv_freq", "norm.weight", "lm_head.weight"]
    assert set(dropped(hf_table(PRESETS["gemma3-4b"]), names)) == {names[0], names[2]}


@pytest.mark.parametrize(
    "pattern",
    [
        "(N H) D -> N H D",
        "D (N H) -> D N H",
        "(N H) -> N H",
        "N H D -> H (D N)",
        "D -> D",
        "(N H) D 1 1 -> N H D",
    ],
)
def test_rearranging_there_and_back(pattern):
    sizes, parsed = dict(N=2, H=3, D=5), Rearrange.parse(pattern)
    array = np.arange(np.prod(shape(parsed.left, sizes))).reshape(shape(parsed.left, sizes))
    there = parsed(array, sizes)
    assert there.shape == shape(parsed.right, sizes)
    np.testing.assert_array_equal(parsed.inverse(there, sizes), array)


def test_rearranging_by_hand():
    array = np.arange(12).reshape(4, 3)
    out = Rearrange.parse("(N H) D -> D N H")(array, dict(N=2, H=2, D=3))
    assert out[1].tolist() == [[1, 4], [7, 10]]


@pytest.mark.parametrize(
    "pattern", ["N H", "N -> H", "N N -> N N", "(N H -> N H", "N2 -> N2", "->"]
)
def test_broken_patterns_are_refused(pattern):
    with pytest.raises(ValueError):
        Rearrange.parse(pattern)
