"""The TPU kernels for quantised matrices in Pallas' interpreter, against the definition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_kernels.quantized_matmul import QuantizedMatrix, quantized_matmul
from gemma_kernels.quantized_matmul.reference import quantized_matmul_reference
from gemma_kernels.quantized_matmul.tpu import quantized_matmul_tpu
from gemma_kernels.quantized_matmul.tpu_factors import loadable, outputs_of_a_step, to_float32
from gemma_kernels.quantized_matmul.tpu_widen import Blocks, default_blocks, many_rows

RANGES = {"int8": (-128, 128), "int4": (-8, 8), "uint4": (0, 16)}


def matrix(O, I, group, dtype="int4", factors="float16", offset=False, seed=0):
    rng = np.random.default_rng(seed)
    codes = jnp.asarray(rng.integers(*RANGES[dtype], (O, I)), jnp.int32).astype(dtype)
    # Some are negative, and some too small for a normal number of float16.
    sizes = rng.choice([1e-2, -1e-2, 1e-5], (1, I // group))
    scale = rng.uniform(0.5, 1.5, (O, I // group)) * sizes
    offsets = jnp.asarray(rng.normal(size=scale.shape) * 1e-2, factors) if offset else None
    return QuantizedMatrix(codes, jnp.asarray(scale, factors), offsets)


def activations(R, I, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(R, I)), jnp.bfloat16)


@partial(jax.jit, static_argnames=("outputs", "blocks", "integers", "activations"))
def run(x_RI, w, **options):
    return quantized_matmul_tpu(x_RI, w.to_columns(), interpret=True, **options)


def assert_close(y_RO, x_RI, w, **options):
    """Each to the rounding of a result to bfloat16, and sums to 2^-14 of the largest."""
    wide = np.asarray(quantized_matmul_reference(x_RI.astype(jnp.float32), w, **options))
    assert y_RO.dtype == jnp.bfloat16
    noise = np.abs(wide).max() * 2.0**-14
    np.testing.assert_allclose(np.asarray(y_RO, np.float32), wide, rtol=2.0**-8, atol=noise)


# rows, inputs, outputs, group, codes, factors, offset, whether products are of int8
CASES = {
    "Q4_0, one row": (1, 640, 384, 32, "int4", "float16", False, True),
    "Q4_1, one row": (1, 640, 256, 32, "uint4", "float16", True, True),
    "Q8_0, two rows": (2, 256, 256, 32, "int8", "float16", False, True),
    "groups of 16, one row": (1, 384, 256, 16, "int8", "float32", False, True),
    "groups of 64, three rows": (3, 384, 384, 64, "int4", "bfloat16", False, True),
    "groups of 128, eight rows, offsets": (8, 256, 256, 128, "uint4", "float16", True, True),
    "eight rows": (8, 256, 256, 32, "int4", "float16", False, True),
    "fp8 codes, one row": (1, 384, 256, 32, "int4", "float16", False, False),
    "fp8 codes, unsigned, five rows": (5, 384, 256, 32, "uint4", "float16", True, False),
    "bfloat16 codes, four rows": (4, 256, 256, 64, "int8", "float16", False, False),
    "groups of 256, one row": (1, 512, 256, 256, "int4", "float32", False, False),
    "per channel, one row": (1, 1152, 256, 1152, "int4", "float32", False, True),
    "per channel, three rows": (3, 640, 256, 640, "int8", "float16", False, False),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_product_with_the_widened_matrix(name):
    R, I, O, group, codes, factors, offset, integers = CASES[name]
    w, x_RI = matrix(O, I, group, codes, factors, offset), activations(R, I)
    assert_close(run(x_RI, w, outputs=256, integers=integers), x_RI, w)


def assert_as_good_as_bfloat16(y_RO, x_RI, w):
    """At most 1.5 times as far off as XLA's product with the matrix in bfloat16."""
    wide = np.asarray(quantized_matmul_reference(x_RI.astype(jnp.float32), w))
    plain = quantized_matmul(x_RI, w, implementation="xla")
    assert y_RO.dtype == jnp.bfloat16
    off, allowed = (
        np.sqrt(np.mean((np.asarray(y, np.float32) - wide) ** 2)) for y in (y_RO, plain)
    )
    assert 0 < off <= 1.5 * allowed


# rows, inputs, outputs, group, codes, offset, blocks
MANY = {
    "nine rows": (9, 256, 256, 32, "int4", False, None),
    "three tiles of inputs, two of rows, two of outputs, offsets": (
        (25, 1536, 384, 32, "uint4", True, Blocks(16, 512, 256))
    ),
    "groups of 64": (20, 1024, 256, 64, "int8", False, Blocks(32, 512, 256)),
    "groups of 512": (20, 1024, 256, 512, "int4", False, Blocks(32, 256, 256)),
    "per channel": (20, 640, 256, 640, "int8", False, Blocks(32, 128, 256)),
}


@pytest.mark.parametrize("name", MANY)
def test_many_rows(name):
    R, I, O, group, codes, offset, blocks = MANY[name]
    w, x_RI = matrix(O, I, group, codes, offset=offset), activations(R, I)
    assert_as_good_as_bfloat16(run(x_RI, w, blocks=blocks), x_RI, w)


def test_many_rows_scaled_in_bfloat16():
    """As on chips whose vector units compute in it."""
    w, x_RI = matrix(256, 512, 32), activations(16, 512)
    options = dict(layer=jnp.int32(0), blocks=Blocks(16, 256, 256), narrow=True, interpret=True)
    y_RO = jax.jit(partial(many_rows, **options))(x_RI, w.to_columns())
    assert_as_good_as_bfloat16(y_RO, x_RI, w)


def test_steps_are_few_and_shared_evenly():
    for I, O, most, cores, outputs in (
        (2560, 10_240, 3_000, 1, 2_560),
        (1024, 640, 4_000, 1, 640),
        (1024, 640, 4_000, 2, 640),  # halves would not be multiples of 128
        (4096, 5_376, 1_100, 2, 896),
        (21_504, 5_376, 9, 1, 128),
    ):
        assert outputs_of_a_step(I, O, most, 128, cores) == outputs
    for I, inputs in ((640, 640), (3_840, 1_920), (6_912, 2_304), (21_504, 1_792)):
        assert default_blocks(64, I, 2_048, 4, 128, 1).inputs == inputs


def test_outliers_of_activations_cost_others_no_digits():
    """Units are per group: beside one of 1,000, the numbers of other groups keep theirs."""
    x_RI = activations(1, 256).at[0, 5].set(1000)
    w = matrix(256, 256, 32)
    w = QuantizedMatrix(w.codes.at[:, :32].set(0), w.scale)
    assert_close(run(x_RI, w), x_RI, w)


def test_activations_rounded_to_int8():
    w, x_RI = matrix(256, 256, 32), activations(2, 256)
    y_RO = run(x_RI, w, activations="int8")
    assert_close(y_RO, x_RI, w, activations="int8")
    assert not np.array_equal(y_RO, run(x_RI, w))


@pytest.mark.parametrize("R, O, group", [(1, 320, 32), (3, 256, 384)])
def test_few_rows_with_a_matrix_in_rows(R, O, group):
    w, x_RI = matrix(O, 384, group), activations(R, 384)
    stack = jax.tree.map(lambda a: jnp.stack([a, a]), w)
    product = jax.jit(partial(quantized_matmul_tpu, interpret=True))
    y_RO = product(x_RI, w)
    assert_close(y_RO, x_RI, w)
    np.testing.assert_array_equal(product(x_RI, stack, layer=jnp.int32(1)), y_RO)


def test_a_second_run_gives_the_same_bits():
    w, x_RI = matrix(256, 256, 32), activations(3, 256)
    np.testing.assert_array_equal(run(x_RI, w), run(x_RI, w))


def test_a_layer_of_a_stack():
    layers = [matrix(256, 256, 32, seed=n) for n in range(3)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    x_RI = activations(2, 256)
    for layer, w in enumerate(layers):
        assert_close(run(x_RI, stack, layer=jnp.int32(layer)), x_RI, w)
        y_RO = quantized_matmul(x_RI, stack, layer=jnp.int32(layer), implementation="reference")
        np.testing.assert_array_equal(y_RO, quantized_matmul_reference(x_RI, w))


def test_every_float16_is_read_exactly():
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = bits[(bits & 0x7C00) != 0x7C00].view(np.float16)  # all but inf and nan
    read = to_float32(loadable(jnp.asarray(numbers)))
    np.testing.assert_array_equal(read, numbers.astype(np.float32))


def test_columns_are_the_same_matrix():
    w = matrix(16, 64, 32, "uint4", offset=True)
    columns = w.to_columns()
    assert columns.codes.shape == (64, 16) and columns.scale.shape == (2, 16)
    assert (columns.shape, columns.group, columns.bits) == (w.shape, w.group, w.bits)
    ids = jnp.array([[3, 0], [15, 3]])
    for other in (columns, columns.to_rows(), columns.to_tiles(), w.to_tiles().to_columns()):
        np.testing.assert_array_equal(other.dense(), w.dense())
        np.testing.assert_array_equal(other.rows(ids), w.rows(ids))
    assert columns.to_rows().scale.dtype == w.scale.dtype


REFUSED = {
    "activations are float32": (jnp.ones((1, 128)), {}),
    "weights lie in rows; with 9 activations": (activations(9, 128), dict(columns=False)),
    "weights lie in tiles": (activations(1, 128), dict(columns=False, tiled=True)),
    "codes stand for values of a table": (activations(1, 128), dict(table=jnp.ones(16))),
    "160 inputs": (activations(1, 160), {}),
    "200 outputs": (activations(1, 128), dict(O=200)),
    "groups of 8; of more than 8 rows": (activations(9, 128), dict(group=8)),
    "groups of 96": (activations(1, 384), dict(group=96)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_serve_is_refused(reason):
    x_RI, facts = REFUSED[reason]
    w = matrix(facts.get("O", 256), x_RI.shape[1], facts.get("group", 32))
    w = QuantizedMatrix(w.codes, w.scale, table=facts.get("table"))
    w = w.to_columns() if facts.get("columns", True) else w
    w = w.to_tiles() if facts.get("tiled") else w
    with pytest.raises(NotImplementedError, match=reason):
        quantized_matmul_tpu(x_RI, w, interpret=True)


def test_without_a_tpu_it_is_refused():
    w = matrix(256, 128, 32).to_columns()
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        quantized_matmul(activations(1, 128), w, implementation="tpu")
    assert quantized_matmul(activations(1, 128), w).shape == (1, 256)  # XLA serves it
