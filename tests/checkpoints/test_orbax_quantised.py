"""Quantised weights in folders of ours: the same codes and scales come back, in either layout."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import gemma_checkpoints as gc
import gemma_jax as gj
from gemma_jax.quantisation import quantise
from gemma_jax.weights.protocol import StandIn, array_bytes, dense
from gemma_jax.weights.quantized import QuantizedWeight
from gemma_jax.weights.tree import flat_params
from gemma_kernels.quantized_matmul import QuantizedMatrix

MIX = {"embed.*": "int8", "*.ffn.*": "int4:64", "*.attn.q.w": "int4:channel"}


def model(layout="scan"):
    return tiny.relayout(tiny.whole_groups("scan"), layout)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised") / "folder"
    return quantise(model(), MIX), str(gj.save(quantise(model(), MIX), None, folder))


def values(model):
    return {path: param.get_value() for path, param in flat_params(model).items()}


def test_the_same_codes_and_scales_come_back(saved):
    before, folder = saved
    after = values(gj.load_model(folder, layout="scan"))
    for path, value in values(before).items():
        assert jax.tree.structure(value) == jax.tree.structure(after[path])
        for ours, theirs in zip(jax.tree.leaves(value), jax.tree.leaves(after[path])):
            assert ours.dtype == theirs.dtype
            assert (ours == theirs).all()


def test_the_other_layout_of_layers_has_the_same(saved):
    before, folder = saved
    again = gj.load_model(folder, layout="unrolled", weights="stored", activations="int8")
    expected = values(tiny.relayout(before, "unrolled"))
    for path, value in values(again).items():
        np.testing.assert_array_equal(dense(value), dense(expected[path]))
    assert again.blocks[0][0].attn.q.w.get_value().activations == "int8"


def test_four_bits_take_half_a_byte(saved):
    before, folder = saved
    opened = gc.open_source(folder)
    sizes = {name: info.nbytes for name, info in opened.tensors.items()}
    assert sum(sizes.values()) == sum(map(array_bytes, jax.tree.leaves(before)))
    infos = opened.tensors["blocks.0.ffn.up.w"], opened.tensors["embed.table"]
    assert [info.encoding for info in infos] == ["INT4", "INT8"]


def test_what_is_asked_for_otherwise_is_widened_first(saved):
    before, folder = saved
    wide = gj.load_model(folder, layout="scan", weights="float32")
    for path, value in values(before).items():
        np.testing.assert_array_equal(values(wide)[path], dense(value))
    small = gj.load_model(folder, layout="scan", weights="int4")
    assert small.embed.table.get_value().matrix.bits == 4
    assert not any(isinstance(v, StandIn) for v in values(gc.load_weights(folder)).values())


def test_straight_onto_a_mesh(saved):
    before, folder = saved
    split = gj.load_model(folder, layout="scan", mesh={"tensor": 4, "data": 2})
    up = split.blocks[0][0].ffn.up.w.get_value()
    for array in jax.tree.leaves(up):
        assert array.addressable_shards[0].data.size == array.size // 4
    tokens = tiny.tokens(before.cfg, 2, 9)
    expected = gj.forward(before, tokens).logits
    np.testing.assert_allclose(gj.forward(split, tokens).logits, expected, atol=2e-5)


def test_blocks_with_offsets_and_tables(tmp_path):
    rng = np.random.default_rng(0)
    plain = model("unrolled")
    codes = jnp.asarray(rng.integers(0, 16, (1, 128, 64)), jnp.uint4)
    scale, offset = (jnp.asarray(rng.normal(size=(1, 128, 2)), jnp.float16) for _ in range(2))
    table = jnp.asarray(rng.normal(size=16), jnp.float32)
    forms = (QuantizedMatrix(codes, scale, offset), QuantizedMatrix(codes, scale, None, table))
    for name, matrix in zip(("gate", "up"), forms):
        weight = QuantizedWeight.of(matrix.to_tiles(), (1, 128, 64), 1, num_stacked=1)
        getattr(plain.blocks[0][0].ffn, name).w.set_value(weight)
    again = gj.load_model(str(gj.save(plain, None, tmp_path / "out")))
    for name in ("gate", "up"):
        ours, theirs = (getattr(m.blocks[0][0].ffn, name).w.get_value() for m in (plain, again))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            assert a.dtype == b.dtype and (a == b).all()


def test_an_odd_number_of_inputs(tmp_path):
    cfg = tiny.gemma3(layers=1)
    odd = tiny.model(replace(cfg, layers=tuple(replace(s, d_ff=37) for s in cfg.layers)))
    small = quantise(odd, {"*.down.w": "int4:channel"})
    again = gj.load_model(str(gj.save(small, None, tmp_path / "out")), layout="scan")
    ours, theirs = (m.blocks[0][0].ffn.down.w.get_value() for m in (small, again))
    assert ours.shape[-1] == 37
    np.testing.assert_array_equal(dense(ours), dense(theirs))


def test_other_formats_refuse_them_by_name(saved, tmp_path):
    with pytest.raises(gc.CheckpointError, match="is QuantizedWeight: only plain floats") as error:
        gj.save(saved[0], None, tmp_path / "out", format="hf")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda q: q.update(bits=8), r"has codes \[128, 32\] and scales \[128, 1\]"),
        (lambda q: q.pop("shape"), "broken config"),
        (lambda q: q.update(shape=[128, 62]), r"ffn.up.w has shape \[128, 62\], but"),
    ],
)
def test_broken_manifests(saved, tmp_path, change, message):
    folder = tmp_path / "broken"
    shutil.copytree(saved[1], folder)
    file = folder / "gemma_jax.json"
    manifest = json.loads(file.read_text())
    change(manifest["quantised"]["blocks.0.ffn.up.w"])
    change(manifest["quantised"]["blocks.1.ffn.up.w"])
    file.write_text(json.dumps(manifest))
    with pytest.raises(gc.CheckpointError, match=message):
        gj.load_model(str(folder), layout="unrolled")


def test_floats_have_no_blocks_to_keep():
    with pytest.raises(ValueError, match="weights='stored': checkpoints/digits has no quantised"):
        gj.load_model("checkpoints/digits", weights="stored")
