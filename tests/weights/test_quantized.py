"""Weights as codes and scales: the same numbers in rows and in tiles, whole, cut and spread."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from marks import nightly

import gemma_jax as gj
from gemma_jax import forward, generate, matformer
from gemma_jax.placement import shard
from gemma_jax.quantisation import keep_matrix, quantise
from gemma_jax.sharding import TRAINING, make_mesh
from gemma_jax.weights import quantized as module
from gemma_jax.weights.contract import contract
from gemma_jax.weights.gather import lookup
from gemma_jax.weights.protocol import dense, take
from gemma_jax.weights.quantized import QuantizedWeight
from gemma_jax.weights.tree import map_params
from gemma_jax.weights.view import Part
from gemma_kernels.quantized_matmul import QuantizedMatrix, nbytes

ATOL = 2e-5  # ten times the rounding of float32 sums in another order; mistakes show at 0.1
FORMS = {
    "int8": (8, None),
    "int8:32": (8, 32),
    "int4:32": (4, 32),
    "int4:64": (4, 64),
    "int4:channel": (4, None),
}
EQUATIONS = {
    "BTD,NHD->BTNH": (6, 16, 128),
    "BTNH,DNH->BTD": (16, 8, 16),
    "BTD,VD->BTV": (64, 128),
}
CUTS = {
    "outputs in whole tiles": (-3, 8),
    "outputs through tiles": (-3, (1, 2, 5)),
    "inputs in whole groups of 64": (-2, 4),
    "inputs behind a group of 64": (-2, (4, 5, 6, 7)),
}


def by_turns(first, second):
    """All pairs, in tiles and in rows by turns; at night each pair in the other layout as well."""
    pairs = [(a, b, (i + j) % 2 == 0) for i, a in enumerate(first) for j, b in enumerate(second)]
    return [*pairs, *nightly(*((a, b, not tiled) for a, b, tiled in pairs))]


def in_rows(model):
    """The same codes in the layout of accelerators."""

    def rows(param):
        value = param.get_value()
        if not isinstance(value, QuantizedWeight):
            return value
        return replace(value, matrix=value.matrix.to_rows())

    return map_params(model, rows)


def array_of(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def weight_of(equation, form, *, tiled=True):
    dims = equation.split(",")[1].split("->")[0]
    num_inputs = sum(letter in equation.split(",")[0] for letter in dims)
    weight = QuantizedWeight.rounded(array_of(EQUATIONS[equation]), num_inputs, *FORMS[form])
    return weight if tiled else replace(weight, matrix=weight.matrix.to_rows())


@pytest.mark.parametrize("equation, form, tiled", by_turns(EQUATIONS, FORMS))
def test_products_rows_and_bytes_are_those_of_the_dense_array(equation, form, tiled):
    weight = weight_of(equation, form, tiled=tiled)
    assert weight.matrix.tiled == tiled and weight.shape == EQUATIONS[equation]
    wide = dense(weight)
    sizes = dict(zip(equation.split(",")[1], weight.shape)) | {"B": 2, "T": 3}
    x = array_of([sizes[letter] for letter in equation.split(",")[0]], seed=1)
    expected = jnp.einsum(equation, x, wide, precision="highest")
    np.testing.assert_allclose(contract(equation, x, weight), expected, atol=1e-4)
    ids = jnp.array([[5, 0], [3, 3]])
    np.testing.assert_array_equal(lookup(weight, ids), wide[ids])
    assert weight.nbytes == nbytes(weight.matrix)
    bits, group = FORMS[form]
    inputs = int(np.prod(weight.inputs))
    scales = wide.size // inputs * (1 if group is None else inputs // group)
    assert weight.nbytes == wide.size * bits // 8 + 4 * scales


def test_rows_and_tiles_hold_the_same_numbers():
    for form in FORMS:
        tiles, rows = (weight_of("BTNH,DNH->BTD", form, tiled=t) for t in (True, False))
        np.testing.assert_array_equal(dense(tiles), dense(rows))


@pytest.mark.parametrize("bits", [4, 8])
def test_pieces_make_the_same_weight(monkeypatch, bits):
    """A large one is rounded some rows at a time."""
    array = array_of((4, 48, 64))
    whole = QuantizedWeight.rounded(array, 1, bits, 32)
    monkeypatch.setattr(module, "PIECE_BYTES", 16 * 64 * 4)
    pieces = QuantizedWeight.rounded(array, 1, bits, 32)
    assert jax.tree.structure(pieces) == jax.tree.structure(whole)
    for ours, theirs in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole)):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    jaxpr = str(jax.make_jaxpr(lambda a: QuantizedWeight.rounded(a, 1, bits, 32))(array))
    assert "scan" in jaxpr


@pytest.mark.parametrize("cut, form, tiled", by_turns(CUTS, FORMS))
def test_what_is_taken_is_taken_of_dense(form, tiled, cut):
    axis, index = CUTS[cut]
    weight = weight_of("BTNH,DNH->BTD", form, tiled=tiled)
    expected = take(dense(weight), axis, index)
    taken = take(weight, axis, index)
    assert taken.shape == expected.shape
    np.testing.assert_array_equal(dense(taken), expected)
    assert taken.matrix.tiled == (tiled and axis + 3 + len(str(index)) != 9)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), weight)
    np.testing.assert_array_equal(dense(take(stacked, axis, index))[1], expected)


@pytest.mark.parametrize("tiled", [True, False], ids=["tiles", "rows"])
def test_an_inner_output_axis_and_a_part_of_a_group(tiled):
    weight = weight_of("BTD,NHD->BTNH", "int4:64", tiled=tiled)
    for axis, index in ((-2, 8), (-2, (0, 3)), (-3, (1, 4)), (-3, 2)):
        expected = take(dense(weight), axis, index)
        np.testing.assert_array_equal(dense(take(weight, axis, index)), expected)
    for index in (32, tuple(range(32, 96))):
        with pytest.raises(ValueError) as error:
            take(weight, -1, index)
        assert str(error.value) == (
            "the cut goes through a group of 64 inputs that share a scale; use multiples of 64, or "
            "weights with a scale per channel"
        )
    by_channel = weight_of("BTD,NHD->BTNH", "int4:channel", tiled=tiled)
    expected = take(dense(by_channel), -1, (3, 4, 90))
    np.testing.assert_array_equal(dense(take(by_channel, -1, (3, 4, 90))), expected)


def test_blocks_of_files_with_offsets_and_tables():
    """Any matrix of the common form is a weight: here of three layers, in either layout."""
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, 16, (3, 32, 64)), jnp.uint4)
    scale, offset = (jnp.asarray(rng.normal(size=(3, 32, 2)), jnp.float16) for _ in range(2))
    table = jnp.asarray(rng.normal(size=16), jnp.float32)
    param = nnx.Param(jnp.zeros((3, 2, 16, 64)), dims="NHD", inputs="D")
    for matrix in (
        QuantizedMatrix(codes, scale, offset),
        QuantizedMatrix(codes, scale, None, table),
    ):
        expected = matrix.dense().reshape(3, 2, 16, 64)
        for one in (matrix, matrix.to_tiles()):
            weight = keep_matrix()(param, one)
            assert weight.shape == (3, 2, 16, 64)
            np.testing.assert_array_equal(dense(weight), expected)
            layer = jax.tree.map(lambda a: a[1], weight)
            np.testing.assert_array_equal(dense(layer), expected[1])
            x = array_of((1, 2, 64))
            y = contract("BTD,NHD->BTNH", x, layer)
            wanted = jnp.einsum("BTD,NHD->BTNH", x, expected[1], precision="highest")
            np.testing.assert_allclose(y, wanted, atol=1e-4)
            np.testing.assert_array_equal(dense(take(weight, -2, 8)), expected[:, :, :8])


def test_tiles_across_rows_of_heads_become_rows():
    """Six outputs of five: the tiles of a file would mix two of the outer axis."""
    matrix = QuantizedMatrix(*module.round_to_groups(array_of((40, 64)), 4, 32)).to_tiles()
    weight = QuantizedWeight.of(matrix, (8, 5, 64), 1)
    assert not weight.matrix.tiled
    np.testing.assert_array_equal(dense(weight), matrix.dense().reshape(8, 5, 64))


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
@pytest.mark.parametrize("storage", ["int4", *nightly("int8:32", "int4:channel")])
def test_models_compute_what_the_widened_ones_do(layout, storage):
    model = quantise(tiny.whole_groups(layout), storage)
    tokens = tiny.tokens(model.cfg, 2, 19)
    expected = forward(tiny.widened(model), tokens).logits
    for other in (model, in_rows(model)):
        np.testing.assert_allclose(forward(other, tokens).logits, expected, atol=ATOL)


def test_gemma3n_with_its_table_and_mixed_storages():
    cfg = tiny.gemma3n(4, 1)
    cfg = replace(
        cfg,
        d_model=64,
        layers=tuple(replace(spec, d_ff=64) for spec in cfg.layers),
        per_layer=replace(cfg.per_layer, width=32, vocab_size=88),
    )
    rules = {"per_layer.table": "int4:32", "embed.*": "int8", "*.ffn.*": "int4:64"}
    model = quantise(tiny.model(cfg), rules)
    table = model.per_layer.table.get_value()
    assert table.shape == (88, 4, 32) and not table.matrix.tiled  # of four rows, not of eight
    tokens = tiny.tokens(cfg, 2, 9)
    expected = forward(tiny.widened(model), tokens).logits
    np.testing.assert_allclose(forward(model, tokens).logits, expected, atol=ATOL)


def test_every_layout_writes_the_same_text():
    stacked = quantise(tiny.whole_groups("scan", layers=2), {"embed.*": "int8", "*": "int4"})
    model, prompts = tiny.relayout(stacked, "unrolled"), tiny.tokens(stacked.cfg, 2, 9).tolist()
    assert model.embed.table.get_value().matrix.tiled
    done = [
        [row.token_ids for row in generate(m, None, prompts, max_new_tokens=6)]
        for m in (model, in_rows(model), stacked)
    ]
    assert done[1] == done[0] == done[2]


def test_the_loss_of_a_quantised_table():
    model = quantise(tiny.whole_groups(), "int4:64")
    tokens = tiny.tokens(model.cfg, 2, 9)
    expected = gj.loss(tiny.widened(model), tokens)
    for other in (model, in_rows(model)):
        np.testing.assert_allclose(gj.loss(other, tokens), expected, rtol=1e-5)


def test_slices_and_views_in_whole_groups():
    """F is an output of gate and up, and the input of down."""
    model = quantise(tiny.whole_groups("unrolled"), "int4:32")
    tokens = tiny.tokens(model.cfg, 2, 9)
    submodel = matformer.Slice(ffn_widths=(32, 96, 128))
    expected = forward(matformer.slice(tiny.widened(model), submodel), tokens).logits
    for cut in (matformer.slice, matformer.at):
        found = forward(cut(model, submodel), tokens).logits
        np.testing.assert_allclose(found, expected, atol=ATOL)
    small = matformer.slice(model, submodel).blocks[0][0].ffn.down.w.get_value()
    assert small.matrix.codes.shape == (1, 8, 1, 4, 8, 4)
    through = matformer.Slice(ffn_widths=(48, 64, 128))
    view = matformer.at(model, through)
    for use in (lambda: matformer.slice(model, through), lambda: forward(view, tokens)):
        with pytest.raises(ValueError, match="a group of 32 inputs that share a scale"):
            use()


def test_per_channel_slices_go_through_anything():
    model = quantise(tiny.whole_groups("unrolled"), "int8")
    submodel, tokens = matformer.Slice(ffn_widths=(41, 52, 128)), tiny.tokens(model.cfg, 1, 9)
    expected = forward(matformer.slice(tiny.widened(model), submodel), tokens).logits
    found = forward(matformer.at(model, submodel), tokens).logits
    np.testing.assert_allclose(found, expected, atol=ATOL)


@pytest.mark.parametrize("rows", [False, True], ids=["tiles", "rows"])
@pytest.mark.parametrize(
    "sizes, rules", [(dict(tensor=4), None), *nightly((dict(fsdp=2, tensor=2), TRAINING))]
)
def test_on_four_devices(sizes, rules, rows):
    model = quantise(tiny.whole_groups(), {"blocks.*.ffn.*": "int4:32", "*": "int8"})
    model = in_rows(model) if rows else model
    tokens = tiny.tokens(model.cfg, 4, 19)
    split = shard(model, make_mesh(model.cfg, jax.devices()[:4], **sizes), rules)
    for name in ("up", "down"):
        whole, part = (getattr(m.blocks[0][0].ffn, name).w.get_value() for m in (model, split))
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part)):
            assert b.addressable_shards[0].data.size == a.size // 4
    expected = forward(model, tokens).logits
    np.testing.assert_allclose(forward(split, tokens).logits, expected, atol=ATOL)


@pytest.mark.parametrize("rows", [False, *nightly(True)], ids=["tiles", "rows"])
def test_groups_that_do_not_divide_leave_a_matrix_whole(rows):
    """Four devices share 128 channels, but not two groups of 64: codes and scales stay together."""
    model = quantise(tiny.whole_groups(), {"*": "int4:64"})
    model = in_rows(model) if rows else model
    split = shard(model, make_mesh(model.cfg, jax.devices()[:4], tensor=4))
    down, up = (getattr(split.blocks[0][0].ffn, name).w.get_value() for name in ("down", "up"))
    for array in jax.tree.leaves(down):
        assert array.addressable_shards[0].data.size == array.size
    for array in jax.tree.leaves(up):
        assert array.addressable_shards[0].data.size == array.size // 4
    tokens = tiny.tokens(model.cfg, 1, 9)
    expected = forward(model, tokens).logits
    np.testing.assert_allclose(forward(split, tokens).logits, expected, atol=ATOL)


def test_a_part_of_a_part():
    weight = weight_of("BTD,NHD->BTNH", "int4:32")
    part = Part.of(Part.of(weight, -1, 64), -3, (1, 4))
    expected = dense(weight)[(1, 4), :, :64]
    np.testing.assert_array_equal(dense(part), expected)
    np.testing.assert_array_equal(part.head_rows().dense().reshape(expected.shape), expected)
