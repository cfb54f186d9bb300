"""Quantised products compiled for real TPUs, with the compiler of libtpu and no TPU."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from marks import nightly

from gemma_kernels.compilers.tpu_targets import CHIPS, lower
from gemma_kernels.quantized_matmul import QuantizedMatrix, quantized_matmul
from gemma_kernels.quantized_matmul.tpu import FEW

pytest.importorskip("libtpu", reason="the compiler comes with the plan extra: gemma-jax[plan]")

# name -> rows, inputs, outputs, group, codes, dtype of factors, offsets
SHAPES = {
    "270M, o": (1, 1024, 640, 32, "int4", "int16", False),
    "1B, gate": (2, 1152, 6912, 32, "int8", "int16", False),
    "4B, gate": (1, 2560, 10240, 32, "int4", "int16", False),
    "4B, Q4_K": (1, 10240, 2560, 32, "uint4", "float32", True),
    "12B, down": (4, 15360, 3840, 64, "int4", "bfloat16", False),
    "27B, down": (8, 21504, 5376, 128, "int4", "int16", False),
    "E2B, per layer": (1, 256, 2048, 32, "int4", "int16", False),
    "1B, head": (1, 1152, 262_144, 32, "int8", "int16", False),
    "12B, o, per channel": (2, 4096, 3840, 4096, "int8", "float32", False),
    "12B, gate, 64 rows": (64, 3840, 15360, 32, "int4", "int16", False),
    "4B, down, prefill": (1000, 10240, 2560, 32, "int4", "int16", False),
    "4B, Q4_K, prefill": (512, 2560, 10240, 32, "uint4", "float32", True),
    "27B, down, prefill": (2048, 21504, 5376, 64, "int8", "bfloat16", False),
}
ALL = [(chip, name) for chip in CHIPS for name in SHAPES]
BY_DAY = [("v5e", "270M, o"), ("tpu7x", "E2B, per layer")]


def array(*shape, dtype):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def operands(R, I, O, group, codes, factors, offsets, stack=()):
    factor = array(*stack, I // group, O, dtype=factors)
    x_RI = array(R, I, dtype="bfloat16")
    return [x_RI, array(*stack, I, O, dtype=codes), factor, *([factor] if offsets else [])]


def product(x_RI, *arrays, layer=None, implementation="tpu"):
    w = QuantizedMatrix(*arrays, columns=True)
    return quantized_matmul(x_RI, w, layer=layer, implementation=implementation)


@pytest.mark.parametrize("chip, name", [*BY_DAY, *nightly(*(x for x in ALL if x not in BY_DAY))])
def test_compiles_and_copies_no_weights(chip, name):
    R, I, O, *_ = SHAPES[name]
    lowered = lower(product, chip, *operands(*SHAPES[name]))
    assert "tpu_custom_call" in lowered.as_text()
    memory = lowered.compile().memory_analysis()
    # The activations, for few rows once per group of a tile in two digits, and the result.
    spread = 4 * R * I * (9 if R <= FEW else 1)
    assert memory.temp_size_in_bytes < 2**18 + 2 * spread + 8 * R * O


@pytest.mark.parametrize("chip", nightly(*CHIPS))
def test_a_table_in_rows_is_not_copied(chip):
    """That of Gemma 3 4B, whose width is no multiple of 128; but for its scales."""
    V, D = 262_208, 2_560
    arrays = array(V, D, dtype="int8"), array(V, D // 32, dtype="float16")

    def head(x_RI, *arrays):
        return quantized_matmul(x_RI, QuantizedMatrix(*arrays), implementation="tpu")

    memory = lower(head, chip, array(1, D, dtype="bfloat16"), *arrays).compile().memory_analysis()
    assert memory.temp_size_in_bytes < V * D // 10


@pytest.mark.parametrize("chip", ["tpu7x", *nightly("v5e", "v5p", "v6e")])
def test_a_layer_of_a_stack_is_not_copied(chip):
    """A loop over the layers reads each where it lies."""
    shape = (1, 2048, 2048, 32, "int4", "int16", False)

    def loop(x_RI, *arrays):
        def layer(i, x_RI):
            return product(x_RI, *arrays, layer=i)

        return jax.lax.fori_loop(0, 8, layer, x_RI)

    memory = lower(loop, chip, *operands(*shape, stack=(8,))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 2048 // 2 // 2


def test_the_first_that_serves_is_taken():
    even, odd = (operands(1, 2560, O, 32, "int4", "int16", False) for O in (256, 200))
    auto = partial(product, implementation="auto")
    assert "tpu_custom_call" in lower(auto, "v5e", *even).as_text()
    assert "tpu_custom_call" not in lower(auto, "v5e", *odd).as_text()
