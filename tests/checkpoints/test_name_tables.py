"""Tables are bijections, checked from names and shapes alone: no weights."""

import numpy as np
import pytest

from gemma_checkpoints.gguf_names import gguf_table
from gemma_checkpoints.hf_names import hf_table
from gemma_checkpoints.params import abstract_model, named_slots
from gemma_checkpoints.rearrange import Rearrange, shape
from gemma_checkpoints.table import Row, dropped, expand
from gemma_jax.presets import PRESETS


@pytest.mark.parametrize("table", [hf_table, gguf_table])
@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_has_exactly_one_row(name, table):
    cfg = PRESETS[name]
    slots = named_slots(abstract_model(cfg, layout="scan"))
    rows = expand(table(cfg), len(cfg.layers))
    assert rows.keys() == slots.keys()
    assert len({row.theirs for row in rows.values()}) == len(rows)
    for ours, row in rows.items():
        if row.parsed is not None:
            assert "".join(row.parsed.right) == slots[ours].dims, "the pattern ends in our axes"


def test_names_do_not_depend_on_the_layout():
    cfg = PRESETS["gemma3-270m"]
    scan, unrolled = (named_slots(abstract_model(cfg, layout=l)) for l in ("scan", "unrolled"))
    assert {n: (s.dims, s.shape) for n, s in scan.items()} == {
        n: (s.dims, s.shape) for n, s in unrolled.items()
    }


def test_gemma_1_calls_the_norm_before_the_ffn_post_attention():
    theirs = "layers.0.post_attention_layernorm.weight"
    for name, ours in (("gemma-2b", "pre_ffn_norm"), ("gemma2-2b", "post_attn_norm")):
        assert expand(hf_table(PRESETS[name]), 1)[f"blocks.0.{ours}.scale"].theirs == theirs


def test_a_name_in_two_rows_is_refused():
    with pytest.raises(ValueError, match="two rows"):
        expand((Row("a", "x"), Row("b", "x")), 1)


def test_dropping_needs_a_reason():
    with pytest.raises(ValueError, match="says why"):
        Row(None, "x")
    table = hf_table(PRESETS["gemma3-4b"], multimodal=True)
    names = ["vision_tower.a.weight", "multi_modal_projector.b", "norm.weight", "lm_head.weight"]
    assert set(dropped(table, names)) == {names[0], names[1], names[3]}
    assert not dropped(hf_table(PRESETS["gemma3-4b"]), names[:2]), "text-only has no vision tensors"


@pytest.mark.parametrize(
    "pattern", ["(N H) D -> N H D", "D (N H) -> D N H", "N H D -> H (D N)", "D -> D"]
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
