"""Weights in columns, as TPUs want them, and read out of stacks: the same numbers."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from marks import nightly

import gemma_jax as gj
from gemma_jax import forward
from gemma_jax.placement import shard
from gemma_jax.quantisation import quantise
from gemma_jax.sharding import TRAINING
from gemma_jax.weights import quantized as module
from gemma_jax.weights.contract import contract
from gemma_jax.weights.gather import lookup
from gemma_jax.weights.protocol import dense, take
from gemma_jax.weights.quantized import QuantizedWeight

ATOL = 2e-5  # ten times the rounding of float32 sums in another order; mistakes show at 0.1


def array_of(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


@pytest.fixture
def in_columns(monkeypatch):
    """Makes weights as on a TPU; products are XLA's."""
    monkeypatch.setattr(module, "target_platform", lambda: "tpu")


LARGE = {"BTD,NHD->BTNH": (4, 64, 128), "BTNH,DNH->BTD": (128, 4, 64)}


@pytest.mark.parametrize("bits, group", [(8, None), (8, 32), (4, 32), (4, 64), (4, None)])
@pytest.mark.parametrize("equation", LARGE)
def test_columns_hold_the_same(in_columns, equation, bits, group):
    num_inputs = 1 if equation.startswith("BTD") else 2
    array, options = array_of(LARGE[equation]), (bits, group)
    rows = QuantizedWeight.rounded(array, num_inputs, *options)
    weight = QuantizedWeight.rounded(array, num_inputs, *options, looked_up=False)
    assert weight.matrix.columns and not rows.matrix.columns and weight.shape == array.shape
    assert weight.nbytes == rows.nbytes
    wide = dense(rows)
    np.testing.assert_array_equal(dense(weight), wide)
    np.testing.assert_array_equal(dense(weight.in_rows()), wide)
    np.testing.assert_array_equal(lookup(weight, jnp.array([[3, 0]])), wide[jnp.array([[3, 0]])])
    x = array_of((2, 3, *array.shape[-num_inputs:]), seed=1)
    expected = jnp.einsum(equation, x, wide, precision="highest")
    np.testing.assert_allclose(contract(equation, x, weight), expected, atol=1e-4)
    for axis, index in ((-3, 2), (-3, (1, 3)), (-2, 64), (-1, 64)):
        if weight.shape[axis] < (index if isinstance(index, int) else 4):
            continue
        if axis == -2 and num_inputs == 2:
            index = 2
        taken = take(weight, axis, index)
        np.testing.assert_array_equal(dense(taken), take(wide, axis, index))
    stacked = QuantizedWeight.rounded(
        jnp.stack([array, 2 * array]), num_inputs, *options, looked_up=False, num_stacked=1
    )
    assert stacked.matrix.columns and len(stacked.matrix.shape) == 3
    for i in range(2):
        layer = stacked.at_layer(jnp.int32(i))
        assert layer.shape == array.shape
        np.testing.assert_array_equal(dense(layer), dense(stacked)[i])
        np.testing.assert_allclose(contract(equation, x, layer), (1 + i) * expected, atol=1e-3)


@pytest.mark.parametrize("axes", [dict(tensor=4), *nightly(dict(fsdp=2, tensor=2))], ids=str)
def test_columns_on_a_mesh(in_columns, axes):
    """Two key heads are whole on four devices, though their channels would divide."""
    cfg = tiny.gemma3(layers=3, d_model=128, num_heads=4, head_dim=64)
    cfg = replace(cfg, layers=tuple(replace(spec, d_ff=256) for spec in cfg.layers))
    flat = jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
        devices=jax.devices()[:4],
    )
    model = quantise(tiny.model(cfg), {"embed.*": "int8", "*": "int4"})
    split = shard(model, flat, TRAINING if "fsdp" in axes else None)
    attention, ffn = split.blocks[0][0].attn, split.blocks[0][0].ffn
    parts = {
        name: array.size // array.addressable_shards[0].data.size
        for name, param in (("k", attention.k.w), ("q", attention.q.w), ("down", ffn.down.w))
        for array in [param.get_value().matrix.codes]
    }
    assert parts == ({"k": 1, "q": 4, "down": 4} if "fsdp" not in axes else dict.fromkeys(parts, 4))
    tokens = tiny.tokens(cfg, 4, 9)
    expected = forward(model, tokens).logits
    np.testing.assert_allclose(forward(split, tokens).logits, expected, atol=ATOL)


def test_columns_are_saved_as_rows(in_columns, monkeypatch, tmp_path):
    cfg = tiny.gemma3(layers=3, d_model=128, num_heads=4, head_dim=64)
    cfg = replace(cfg, layers=tuple(replace(spec, d_ff=256) for spec in cfg.layers))
    model = quantise(tiny.model(cfg), "int4")
    folder = str(gj.save(model, None, tmp_path / "out"))
    assert gj.load_model(folder, layout="scan").blocks[0][0].ffn.up.w.get_value().matrix.columns
    monkeypatch.undo()
    again = gj.load_model(folder, layout="scan").blocks[0][0].ffn.up.w.get_value()
    assert again.matrix.tiled
    np.testing.assert_array_equal(dense(again), dense(model.blocks[0][0].ffn.up.w.get_value()))


def test_a_scan_reads_layers_where_they_lie(monkeypatch):
    """No product is given a layer that was cut out of its stack."""
    given = []

    def product(x_RI, w, *, layer=None, **options):
        given.append((layer is not None, len(w.shape)))
        return original(x_RI, w, layer=layer, **options)

    original = module.quantized_matmul
    monkeypatch.setattr(module, "quantized_matmul", product)
    model = quantise(tiny.whole_groups("scan"), "int4")
    jax.eval_shape(lambda m: forward(m, tiny.tokens(m.cfg, 1, 5)).logits, model)
    assert (True, 3) in given
    assert {stacked == (rank == 3) for stacked, rank in given} == {True}
