"""The Hopper kernel for quantised matrices: in Mosaic GPU's interpreter, and as machine code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import nightly

from gemma_kernels.compilers import hopper_sass as sass
from gemma_kernels.quantized_matmul import QuantizedMatrix, quantized_matmul
from gemma_kernels.quantized_matmul.hopper import quantized_matmul_hopper
from gemma_kernels.quantized_matmul.reference import quantized_matmul_reference

RANGES = {"int8": (-128, 128), "int4": (-8, 8), "uint4": (0, 16)}


def matrix(O, I, group, dtype="int4", offset=False):
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(*RANGES[dtype], (O, I)), jnp.int32).astype(dtype)
    scale = jnp.asarray(rng.uniform(-1e-2, 1e-2, (O, I // group)), jnp.float16)
    offsets = jnp.asarray(rng.normal(size=scale.shape) * 1e-2, jnp.float16) if offset else None
    return QuantizedMatrix(codes, scale, offsets)


def activations(R, I):
    return jnp.asarray(np.random.default_rng(1).normal(size=(R, I)), jnp.bfloat16)


def program(**options):
    return jax.jit(partial(quantized_matmul_hopper, interpret=True, **options))


# rows, inputs, group, codes, offset, splits
CASES = {
    "4 bits": (1, 128, 64, "int4", False, 1),
    "8 bits, two splits": (3, 256, 64, "int8", False, 2),
    "4 bits, groups of 32, offsets": (9, 128, 32, "uint4", True, 1),
    "per channel, more blocks than stages": (2, 768, 768, "int8", False, 1),
    "two products": (130, 128, 128, "int4", False, 1),
}
BY_DAY = ("4 bits",)


@pytest.mark.parametrize("name", [*BY_DAY, *nightly(*(x for x in CASES if x not in BY_DAY))])
def test_it_is_the_product_with_the_widened_matrix(name):
    """To the rounding of the result, bfloat16; a second run gives the same bits."""
    R, I, group, codes, offset, splits = CASES[name]
    w, x_RI = matrix(128, I, group, codes, offset), activations(R, I)
    run = program(splits=splits)
    y_RO = run(x_RI, w)
    wide = np.asarray(quantized_matmul_reference(x_RI.astype(jnp.float32), w))
    assert y_RO.dtype == jnp.bfloat16
    noise = np.abs(wide).max() * 2.0**-14
    np.testing.assert_allclose(np.asarray(y_RO, np.float32), wide, rtol=2.0**-8, atol=noise)
    np.testing.assert_array_equal(run(x_RI, w), y_RO)


@pytest.mark.nightly
def test_a_layer_of_a_stack():
    w, x_RI = matrix(256, 128, 32), activations(1, 128)
    stack = jax.tree.map(lambda a: a.reshape(2, 128, -1), w)
    own = jax.tree.map(lambda a: a[128:], w)
    run = program()
    np.testing.assert_array_equal(run(x_RI, stack, layer=jnp.int32(1)), run(x_RI, own))


REFUSED = {
    "activations are float32": (jnp.ones((1, 128)), {}),
    "weights lie in columns": (activations(1, 128), dict(columns=True)),
    "codes stand for values of a table": (activations(1, 128), dict(table=jnp.ones(16))),
    "160 inputs": (activations(1, 160), {}),
    "200 outputs": (activations(1, 128), dict(O=200)),
    "groups of 16": (activations(1, 128), dict(group=16)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_does_not_serve_is_refused(reason):
    x_RI, facts = REFUSED[reason]
    w = matrix(facts.get("O", 128), x_RI.shape[1], facts.get("group", 32))
    w = QuantizedMatrix(w.codes, w.scale, table=facts.get("table"))
    w = w.to_columns() if facts.get("columns") else w
    with pytest.raises(NotImplementedError, match=reason):
        quantized_matmul_hopper(x_RI, w, interpret=True)


def test_without_a_gpu_it_is_refused():
    with pytest.raises(NotImplementedError, match="needs a GPU"):
        quantized_matmul(activations(1, 128), matrix(128, 128, 32), implementation="hopper")


# rows, inputs, outputs, group, codes, offset
COMPILED = {
    "4B, gate": (1, 2560, 10240, 32, "int4", False),
    "4B, gate, Q8_0": (8, 2560, 10240, 32, "int8", False),
    "4B, down, Q4_K": (2, 10240, 2560, 32, "uint4", True),
    "12B, o, per channel": (1, 4096, 3840, 4096, "int8", False),
    "27B, gate, prefill": (512, 5376, 21504, 64, "int4", False),
}


@pytest.mark.parametrize("name", COMPILED)
def test_as_machine_code_nothing_is_spilled(name):
    if reason := sass.missing():
        pytest.skip(reason)
    R, I, O, group, codes, offset = COMPILED[name]
    factor = jax.ShapeDtypeStruct((O, I // group), jnp.float16)
    x_RI = jax.ShapeDtypeStruct((R, I), jnp.bfloat16)
    codes_OI = jax.ShapeDtypeStruct((O, I), jnp.dtype(codes))

    def product(x_RI, *arrays):
        return quantized_matmul_hopper(x_RI, QuantizedMatrix(*arrays))

    arrays = (codes_OI, factor, *([factor] if offset else []))
    compiled, (kernel,) = sass.compile_for_hopper(product, x_RI, *arrays)
    assert kernel.spilled == 0
    assert kernel.products >= 8  # 16 inputs each, of a block of 128
    if kernel.instructions is not None:
        assert kernel.instructions["HGMMA"] >= 8
        assert kernel.instructions["UTMALDG"] > 0
    # Partial sums and activations, and no weights.
    assert compiled.memory_analysis().temp_size_in_bytes < I * O // 4 + 16 * R * (I + O)
