"""One suite over every implementation of the product with a quantised matrix."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gemma_kernels.quantized_matmul import IMPLEMENTATIONS, QuantizedMatrix, quantized_matmul
from gemma_kernels.quantized_matmul.cases import CASES
from gemma_kernels.quantized_matmul.cpu import TARGETS, instructions
from gemma_kernels.quantized_matmul.reference import rounded_to_int8

ROWS = (1, 2, 3, 8, 17, 100)
BY_NAME = {case.name: case for case in CASES}
FEW = [BY_NAME[name] for name in ("Q8_0", "Q6_K", "Q4_K", "nf4")]


def instruction_sets() -> list[str]:
    """Those of this machine; none where there is no library."""
    found = []
    for name in ("vnni", "avx512", "avxvnni", "avx2", "dotprod", "plain"):
        try:
            found.append(instructions(name))
        except NotImplementedError:
            continue
    if found:
        instructions("auto")
    return found


SETS = instruction_sets()
# Implementations that run here, and in what layout. `cpu` once per set of instructions.
ELSEWHERE = {"tpu", "hopper"}  # with tests of their own: test_quantized_matmul_{tpu,hopper}.py
WAYS = [("xla", "rows"), ("xla", "tiles"), *((f"cpu/{name}", "tiles") for name in SETS)]


@pytest.fixture(autouse=True)
def best_instructions():
    yield
    if SETS:
        instructions("auto")


def product(way: str, activations: str = "float", **options):
    """The jitted product of an implementation, `cpu/avx2` with instructions of that name."""
    name, _, wanted = way.partition("/")
    if wanted:
        instructions(wanted)
    return _program(name, activations, *options.items())


@cache
def _program(name, activations, *options):
    options = dict(options, activations=activations, implementation=name)
    return jax.jit(partial(quantized_matmul, **options))


def laid_out(matrix, layout):
    return matrix.to_tiles() if layout == "tiles" else matrix


def exact(x, matrix, activations="float"):
    """The product in float64."""
    if activations == "int8":
        x = rounded_to_int8(x)
    return np.asarray(x, np.float64) @ np.asarray(matrix.dense(), np.float64).T


def noise(x, matrix, activations="float"):
    """How far a sum in float32, column by column, is from the product in float64."""
    rounded = np.asarray(rounded_to_int8(x) if activations == "int8" else x)
    y = np.stack([np.cumsum(row * np.asarray(matrix.dense()), axis=1)[:, -1] for row in rounded])
    return np.abs(y - exact(x, matrix, activations)).max()


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("way, layout", WAYS)
def test_the_product_is_that_of_the_definition(way, layout, case, activations):
    if case.table and activations == "int8" and way.startswith("cpu"):
        pytest.skip("refused: see test_what_tiles_on_cpus_refuse")
    matrix = case.matrix()
    w = laid_out(matrix, layout)
    many = ROWS if way.startswith("cpu") else (1, 3, 100)
    for rows in many if case in FEW else (1, 17):
        x = case.x(rows)
        y = product(way, activations)(x, w)
        assert y.dtype == x.dtype and y.shape == (rows, case.O)
        off = np.abs(np.asarray(y, np.float64) - exact(x, matrix, activations)).max()
        assert off <= 2 * noise(x, matrix, activations), rows


@pytest.mark.parametrize("way, layout", WAYS)
def test_bfloat16_activations(way, layout):
    case = BY_NAME["Q4_K"]
    matrix = case.matrix()
    x = case.x(3, jnp.bfloat16)
    y = product(way)(x, laid_out(matrix, layout))
    assert y.dtype == jnp.bfloat16
    expected = exact(x, matrix)
    # XLA multiplies in bfloat16, and so rounds the matrix too.
    tolerance = 2**-8 if way.startswith("cpu") else 2**-6
    assert np.abs(np.asarray(y, np.float64) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("way, layout", WAYS)
def test_a_second_run_gives_the_same_bits(way, layout, activations):
    case = BY_NAME["8 bits per channel"]
    w, x = laid_out(case.matrix(), layout), case.x(17)
    first, second = (product(way, activations)(x, w) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("way", [way for way, _ in WAYS if way.startswith("cpu")])
def test_rows_do_not_depend_on_their_neighbours(way):
    for case in FEW:
        w, x = case.matrix().to_tiles(), case.x(17)
        together = product(way)(x, w)
        alone = product(way)(x[4:5], w)
        np.testing.assert_allclose(together[4:5], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_a_batch_becomes_rows(implementation, activations):
    skip_without_library(implementation)
    case = BY_NAME["Q6_K"]
    w, x = case.matrix().to_tiles(), case.x(6).reshape(2, 3, case.I)
    expected = quantized_matmul(x.reshape(6, -1), w, activations=activations)
    y = jax.jit(jax.vmap(lambda x: product(implementation, activations)(x, w)))(x)
    np.testing.assert_allclose(y.reshape(6, -1), expected, rtol=0, atol=1e-4)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), w, case.matrix(1).to_tiles())
    one_each = jax.vmap(lambda x, w: product(implementation, activations)(x, w))(x, stack)
    np.testing.assert_allclose(one_each[0], y[0], rtol=0, atol=1e-4)
    assert np.abs(one_each[1] - y[1]).max() > 0.1
    shared = jax.vmap(lambda w: product(implementation, activations)(x[0], w))(stack)
    np.testing.assert_allclose(shared[1], quantized_matmul(x[0], case.matrix(1)), atol=1e-1)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_one_matrix_of_a_stack(implementation, case, activations):
    skip_without_library(implementation)
    if case.table and activations == "int8":
        pytest.skip("refused: see test_what_tiles_on_cpus_refuse")
    matrices, x = [case.matrix(seed).to_tiles() for seed in range(3)], case.x(2)
    table = matrices[0].table
    matrices = [replace(matrix, table=table) for matrix in matrices]
    stack = replace(jax.tree.map(lambda *leaves: jnp.stack(leaves), *matrices), table=table)
    one = product(implementation, activations)
    _, found = jax.lax.scan(
        lambda carry, layer: (carry, one(x, stack, layer=layer)), 0, jnp.arange(3)
    )
    for matrix, y in zip(matrices, found, strict=True):
        np.testing.assert_allclose(y, one(x, matrix), rtol=0, atol=1e-4)
    each = jax.vmap(lambda layer: one(x, stack, layer=layer))(jnp.arange(3))
    np.testing.assert_allclose(each, found, rtol=0, atol=1e-4)
    if activations == "float":
        frozen = partial(quantized_matmul, layer=1, frozen=True, implementation=implementation)
        gradient = jax.grad(lambda x: frozen(x, stack).sum())(x)
        np.testing.assert_allclose(gradient[0], matrices[1].dense().sum(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_loops_and_scans(implementation):
    skip_without_library(implementation)
    case = BY_NAME["Q4_0"]
    w, x = case.matrix().to_tiles(), case.x(4)
    expected = product(implementation)(x, w)

    def step(carry, x):
        return carry + 1, product(implementation)(x[None], w)[0]

    _, scanned = jax.jit(lambda x: jax.lax.scan(step, 0, x))(x)
    np.testing.assert_allclose(scanned, expected, rtol=0, atol=1e-5)
    body = lambda i, y: y.at[i].set(product(implementation)(x[i][None], w)[0])  # noqa: E731
    looped = jax.jit(lambda y: jax.lax.fori_loop(0, 4, body, y))(jnp.zeros_like(expected))
    np.testing.assert_array_equal(looped, scanned)

    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), w)
    _, layers = jax.lax.scan(lambda c, w: (c, product(implementation)(x, w)), 0, stack)
    np.testing.assert_array_equal(layers[2], expected)


def mesh_of_two():
    return jax.make_mesh((2,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_devices_take_outputs_or_inputs(implementation, activations):
    skip_without_library(implementation)
    case = BY_NAME["4 bits, groups of 128"]  # 6 tiles of rows
    w, x = case.matrix().to_tiles(), case.x(4)
    one = product(implementation, activations)
    whole = one(x, w)
    outputs = jax.shard_map(one, mesh=mesh_of_two(), in_specs=(P(), P("m")), out_specs=P(None, "m"))
    divided = jax.jit(outputs)(x, w)
    np.testing.assert_allclose(divided, whole, rtol=0, atol=1e-4)
    assert implementation == "xla" or np.array_equal(divided, whole)

    case = BY_NAME["Q8_0"]  # 10 tiles of columns
    w, x = case.matrix().to_tiles(), case.x(4)
    parts = QuantizedMatrix(P(None, "m"), P(None, "m"), tiled=True)
    inputs = jax.shard_map(
        lambda x, w: jax.lax.psum(one(x, w), "m"),
        mesh=mesh_of_two(),
        in_specs=(P(None, "m"), parts),
        out_specs=P(),
    )
    np.testing.assert_allclose(jax.jit(inputs)(x, w), one(x, w), rtol=0, atol=1e-4)


def test_a_mesh_outside_of_shard_map_goes_to_xla():
    case = BY_NAME["Q8_0"]
    w, x = case.matrix().to_tiles(), case.x(4)
    with jax.sharding.use_abstract_mesh(mesh_of_two().abstract_mesh):
        with pytest.raises(NotImplementedError, match="call it in a shard_map"):
            jax.eval_shape(partial(quantized_matmul, implementation="cpu"), x, w)
        assert jax.eval_shape(quantized_matmul, x, w).shape == (4, case.O)


def test_gradients_are_refused_unless_the_matrix_is_frozen():
    skip_without_library("cpu")
    case = BY_NAME["Q4_K"]
    w, x = case.matrix().to_tiles(), case.x(3)
    loss = lambda x, **options: jnp.sum(quantized_matmul(x, w, **options) ** 2)  # noqa: E731
    with pytest.raises(NotImplementedError, match="frozen=True"):
        jax.grad(partial(loss, implementation="cpu"))(x)
    expected = jax.grad(partial(loss, implementation="reference"))(x)
    for name in ("cpu", "xla"):
        frozen = jax.jit(jax.grad(partial(loss, implementation=name, frozen=True)))(x)
        np.testing.assert_allclose(frozen, expected, rtol=1e-5, atol=1e-3)
        batched = jax.vmap(jax.grad(partial(loss, implementation=name, frozen=True)))(x[:, None])
        np.testing.assert_allclose(batched[:, 0], expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
def test_a_frozen_matrix_has_the_gradient_of_unrounded_activations(implementation):
    skip_without_library(implementation)
    case = BY_NAME["Q8_0"]
    w, x = case.matrix().to_tiles(), case.x(2)
    frozen = dict(activations="int8", frozen=True, implementation=implementation)
    gradient = jax.grad(lambda x: quantized_matmul(x, w, **frozen).sum())(x)
    np.testing.assert_allclose(gradient[0], w.dense().sum(0), rtol=1e-4, atol=1e-5)
    of_matrix = jax.grad(
        lambda scale: quantized_matmul(
            x, QuantizedMatrix(w.codes, scale, tiled=True), **frozen
        ).sum()
    )(w.scale)
    assert not of_matrix.any()


def test_what_tiles_on_cpus_refuse():
    skip_without_library("cpu")
    matrix = BY_NAME["nf4"].matrix()
    x = BY_NAME["nf4"].x(1)
    cpu = partial(quantized_matmul, implementation="cpu")
    with pytest.raises(NotImplementedError, match="in tiles"):
        cpu(x, matrix)
    with pytest.raises(NotImplementedError, match="no table"):
        cpu(x, matrix.to_tiles(), activations="int8")
    eights = QuantizedMatrix(jnp.ones((8, 64), jnp.int8), jnp.ones((8, 8), jnp.float16)).to_tiles()
    with pytest.raises(NotImplementedError, match="a scale per 8 columns"):
        cpu(jnp.ones((1, 64)), eights)
    # The automatic choice serves them all.
    for w in (matrix, matrix.to_tiles()):
        y = quantized_matmul(x, w, activations="int8")
        assert np.abs(y - exact(x, matrix, "int8")).max() < 1e-4


def test_operands_that_do_not_fit():
    w = BY_NAME["Q8_0"].matrix()
    with pytest.raises(ValueError, match=r"expected \[R, I\] and \[O, I\]"):
        quantized_matmul(jnp.ones((1, 64)), w)
    with pytest.raises(ValueError, match="choose one of: auto, "):
        quantized_matmul(BY_NAME["Q8_0"].x(1), w, implementation="blas")
    with pytest.raises(ValueError, match="choose float or int8"):
        quantized_matmul(BY_NAME["Q8_0"].x(1), w, activations="int4")


GOOD = dict(x=((2, 64), "float32"), codes=((2, 2, 8, 8, 4), "int8"), scale=((2, 2, 8), "float16"),
            offset=((0,), "float32"), table=((0,), "float32"), layer=((0,), "int32"))  # fmt: skip
BAD = {
    "x and y are float32 matrices": dict(x=((2, 64), "float16")),
    "codes are not tiles": dict(codes=((16, 64), "int8")),
    "codes have 4 or 8 bits": dict(codes=((2, 2, 5, 8, 4), "int8")),
    "codes are int8": dict(codes=((2, 2, 8, 8, 4), "uint8")),
    "shapes do not fit together": dict(codes=((3, 2, 8, 8, 4), "int8")),
    "groups are not a multiple of 16": dict(scale=((2, 8, 8), "float16")),
    "scale does not fit the codes": dict(scale=((1, 2, 8), "float16")),
    "offset does not fit the codes": dict(offset=((2, 1, 8), "float16")),
    "a table is float32": dict(table=((8,), "float32")),
    "there is no such layer": dict(
        layer=((), "int32"), codes=((0, 2, 2, 8, 8, 4), "int8"), scale=((0, 2, 2, 8), "float16")
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_the_library_checks_every_shape(message):
    """Whatever calls it: none of these reach memory that is not theirs."""
    skip_without_library("cpu")
    instructions()

    def call(wrong):
        operands = [jnp.zeros(shape, dtype) for shape, dtype in (GOOD | wrong).values()]
        y = jax.ShapeDtypeStruct((2, 16), jnp.float32)
        return jax.block_until_ready(jax.ffi.ffi_call(TARGETS[0], y)(*operands))

    assert not call({}).any()
    with pytest.raises(Exception, match=message):
        call(BAD[message])


def test_exported_programs_name_what_they_need():
    skip_without_library("cpu")
    case = BY_NAME["Q8_0"]
    w, x = case.matrix().to_tiles(), case.x(2)
    program = jax.jit(lambda x: quantized_matmul(x, w, implementation="cpu"))
    with pytest.raises(ValueError, match=TARGETS[0]):
        jax.export.export(program)(x)
    safe = [jax.export.DisabledSafetyCheck.custom_call(name) for name in TARGETS]
    exported = jax.export.export(program, disabled_checks=safe)(x)
    np.testing.assert_array_equal(jax.jit(exported.call)(x), program(x))


def skip_without_library(implementation: str) -> None:
    if implementation == "cpu" and not SETS:
        pytest.skip("no library for quantised products here")


def test_every_implementation_is_in_this_suite():
    assert {way.partition("/")[0] for way, _ in WAYS} | {"cpu", "reference"} | ELSEWHERE == (
        IMPLEMENTATIONS.keys()
    )
