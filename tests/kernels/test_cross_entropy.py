"""Cross-entropy in chunks against its dense definition and optax, and how much memory it takes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from marks import nightly

from gemma_kernels.compilers.tpu_targets import lower
from gemma_kernels.cross_entropy import IMPLEMENTATIONS, cross_entropy
from gemma_kernels.cross_entropy.xla import default_chunk
from gemma_kernels.quantized_matmul import QuantizedMatrix


def operands(B=2, T=5, D=12, V=96, dtype=jnp.float32, seed=0):
    """Activations, a table and labels, of which every fourth is ignored."""
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.standard_normal((B, T, D)), dtype)
    table = jnp.asarray(random.standard_normal((V, D)), dtype)
    labels = np.where(np.arange(B * T) % 4 == 3, -1, random.integers(0, V, B * T))
    return x, table, jnp.asarray(labels.reshape(B, T), jnp.int32)


def values_and_gradients(x, table, labels, name=None, **options):
    """Losses, log-sum-exps, and gradients of a sum in which every token counts differently: of both
    operands, and of the activations in front of a frozen table."""

    @jax.jit
    def run(x, table):
        def total(x, table):
            out = cross_entropy(x, table, labels, implementation=name, return_lse=True, **options)
            waves = jnp.cos(jnp.arange(labels.size)).reshape(labels.shape)
            return jnp.sum(out[0] * waves) + jnp.sum(out[1] * waves[::-1]), out

        before_frozen, _ = jax.grad(total, has_aux=True)(x, table)
        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(x, table), before_frozen

    ((_, out), gradients), before_frozen = run(x, table)
    return *out, *gradients, before_frozen


def assert_close(actual, expected, atol=2e-5):
    for ours, theirs in zip(actual, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=atol, rtol=1e-5
        )


def test_by_hand():
    """Two entries with logits 0 and ln 3: probabilities 1/4 and 3/4."""
    x, table = jnp.ones((1, 3, 1)), jnp.array([[0.0], [np.log(3.0)]])
    for name in IMPLEMENTATIONS:
        losses, lse = cross_entropy(
            x, table, jnp.array([[0, 1, -1]]), return_lse=True, implementation=name
        )
        np.testing.assert_allclose(losses, [[np.log(4), np.log(4 / 3), 0]], rtol=1e-6)
        np.testing.assert_allclose(lse, np.full((1, 3), np.log(4)), rtol=1e-6)


@pytest.mark.parametrize(
    "V, chunk",
    [(96, 1), (96, 32), (96, 1000), (101, 7), (101, None), (2, 1), (1, None), (160, 64), (272, 80)],
)
def test_any_chunk_of_any_vocabulary(V, chunk):
    arrays = operands(V=V)
    assert_close(
        values_and_gradients(*arrays, chunk=chunk), values_and_gradients(*arrays, "reference")
    )


@pytest.mark.parametrize(
    "options",
    [{"soft_cap": 3.0}, {"z_loss": 1e-2}, {"soft_cap": 2.0, "z_loss": 1e-1}],
    ids=str,
)
def test_soft_cap_and_z_loss(options):
    arrays = operands(B=1, T=17, V=80)
    assert_close(
        values_and_gradients(*arrays, chunk=32, **options),
        values_and_gradients(*arrays, "reference", **options),
    )


def test_against_optax():
    x, table, labels = operands(B=3, T=7, V=130)

    def plain(x, table):
        logits = jnp.einsum("BTD,VD->BTV", x, table, precision="highest")
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.sum(losses * (labels >= 0))

    def ours(x, table):
        return cross_entropy(x, table, labels, chunk=50).sum()

    runs = [jax.jit(jax.value_and_grad(f, (0, 1)))(x, table) for f in (ours, plain)]
    assert_close(*map(jax.tree.leaves, runs))


def test_ignored_tokens_leave_no_trace():
    """Whatever their activations are: the others lose and learn as if they were not there."""
    x, table, labels = operands(B=1, T=8)
    weights = jnp.where(jnp.arange(8) % 4 == 0, 0.0, 0.5)[None]
    kept = np.flatnonzero((labels >= 0) & (weights > 0))

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def run(x, table, labels, weights):
        losses = cross_entropy(x, table, labels, weights_BT=weights, z_loss=0.1, chunk=32)
        return losses.sum()

    loud = x.at[:, [i for i in range(8) if i not in kept]].mul(1e4)
    total, (dx, dtable) = run(loud, table, labels, weights)
    expected, (dx_kept, dtable_kept) = run(x[:, kept], table, labels[:, kept], weights[:, kept])
    assert_close((total, dx[:, kept], dtable), (expected, dx_kept, dtable_kept))
    assert not np.delete(np.asarray(dx), kept, axis=1).any()
    nothing, gradients = run(x, table, jnp.full_like(labels, -1), weights)
    assert nothing == 0 and not any(np.asarray(g).any() for g in gradients)


def test_weights_learn():
    x, table, labels = operands()
    losses = cross_entropy(x, table, labels)
    ones = jnp.ones(labels.shape)
    run = jax.grad(lambda w: cross_entropy(x, table, labels, weights_BT=w, chunk=32).sum())
    np.testing.assert_allclose(run(ones), losses, rtol=1e-5)


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("bfloat16", "float32")], ids=str)
def test_bfloat16_errs_no_more_than_plain_code(dtypes):
    """Error against float32 at most twice that of plain code in the same dtypes."""
    x, table, labels = operands(B=2, T=16, D=64, V=200)
    x, table = x.astype(dtypes[0]), (table / 8).astype(dtypes[1])
    labels = jnp.abs(labels)

    def plain(x, table):
        logits = jnp.einsum("BTD,VD->BTV", x, table.astype(x.dtype)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()

    def ours(x, table):
        return cross_entropy(x, table, labels, chunk=48).sum()

    wide = [a.astype(dtypes[0]).astype(jnp.float32) for a in (x, table)]
    calls = ((plain, wide), (plain, (x, table)), (ours, (x, table)))
    leaves = [jax.tree.leaves(jax.jit(jax.value_and_grad(f, (0, 1)))(*a)) for f, a in calls]
    for exact, fair, actual in zip(*leaves):
        exact, fair, actual = (np.asarray(a, np.float32) for a in (exact, fair, actual))
        assert np.abs(actual - exact).max() <= 2 * np.abs(fair - exact).max() + 1e-6


def test_gradients_have_the_dtypes_of_the_operands():
    x, table, labels = operands(dtype=jnp.bfloat16)
    _, _, dx, dtable, _ = values_and_gradients(x, table, labels)
    assert (dx.dtype, dtable.dtype) == (jnp.bfloat16, jnp.bfloat16)


@pytest.mark.parametrize("tiled", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("V", [80, 72])
def test_a_quantised_table(V, tiled):
    """As its widened form; it gets no gradient."""
    x, table, labels = operands(V=V, D=32)
    scale = jnp.max(jnp.abs(table), axis=1, keepdims=True) / 127
    stored = QuantizedMatrix(jnp.round(table / scale).astype(jnp.int8), scale)
    stored = stored.to_tiles() if tiled else stored

    def run(table, name=None, **options):
        def total(x):
            losses = cross_entropy(x, table, labels, soft_cap=3.0, implementation=name, **options)
            return losses.sum()

        return jax.jit(jax.value_and_grad(total))(x)

    expected = run(stored.dense(), "reference")
    for name in IMPLEMENTATIONS:
        assert_close(run(stored, name, chunk=32), expected)


@pytest.mark.parametrize("wrap", ["vmap", "remat", "scan"])
def test_under_transformations(wrap):
    x, table, labels = operands(B=4, T=6)

    def rows(x, table, labels):
        return cross_entropy(x, table, labels, chunk=32)

    wrapped = {
        "vmap": lambda x, table: jax.vmap(rows, (0, None, 0))(x[:, None], table, labels[:, None]),
        "remat": lambda x, table: jax.checkpoint(rows)(x, table, labels),
        "scan": lambda x, table: jax.lax.map(
            lambda row: rows(row[0][None], table, row[1][None]), (x, labels)
        ),
    }[wrap]

    def total(f):
        return jax.jit(jax.value_and_grad(lambda x, table: jnp.sum(f(x, table) ** 2), (0, 1)))

    expected = total(lambda x, table: rows(x, table, labels))(x, table)
    assert_close(jax.tree.leaves(total(wrapped)(x, table)), jax.tree.leaves(expected))


def test_second_run_is_equal_to_the_bit():
    arrays = operands(T=33, V=200)
    first, second = (values_and_gradients(*arrays, chunk=48) for _ in range(2))
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_calls(data):
    B, T, D = (data.draw(st.integers(1, n), name) for n, name in ((3, "B"), (9, "T"), (17, "D")))
    V = data.draw(st.integers(1, 120) | st.sampled_from([128, 256, 272]), "V")
    options = dict(soft_cap=data.draw(st.none() | st.floats(0.5, 30), "soft_cap"))
    arrays = operands(B, T, D, V, seed=data.draw(st.integers(0, 99), "seed"))
    chunk = data.draw(st.integers(1, V + 5), "chunk")
    assert_close(
        values_and_gradients(*arrays, chunk=chunk, **options),
        values_and_gradients(*arrays, "reference", **options),
        atol=1e-4,
    )


BATCH, TABLE = PartitionSpec("data", None, None), PartitionSpec("tensor", None)


@pytest.mark.parametrize(
    "shape, x_spec, table_spec",
    [
        ((1, 8), PartitionSpec(), TABLE),
        ((2, 4), BATCH, TABLE),
        ((8, 1), BATCH, PartitionSpec()),
        ((2, 4), PartitionSpec("data", None, "tensor"), PartitionSpec(None, "tensor")),
    ],
    ids=["V over 8", "B over 2, V over 4", "B over 8", "B over 2, D over 4"],
)
def test_sharded(shape, x_spec, table_spec):
    """Same result, and no device gathers the table."""
    x, table, labels = operands(B=8, T=4, D=64, V=4096)
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = (x_spec, table_spec, PartitionSpec(x_spec[0] if len(x_spec) else None))
    shardings = [NamedSharding(mesh, spec) for spec in specs]

    def run(x, table, labels):
        total = lambda x, table: cross_entropy(x, table, labels, chunk=256).sum()  # noqa: E731
        return jax.value_and_grad(total, (0, 1))(x, table), jax.grad(total)(x, table)

    out = ((NamedSharding(mesh, PartitionSpec()), tuple(shardings[:2])), shardings[0])
    compiled = jax.jit(run, out_shardings=out).lower(
        *(
            jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
            for a, s in zip((x, table, labels), shardings)
        )
    )
    compiled = compiled.compile()
    expected = run(x, table, labels)
    actual = compiled(*jax.device_put((x, table, labels), tuple(shardings)))
    assert_close(jax.tree.leaves(actual), jax.tree.leaves(expected), atol=1e-4)
    # Below the table, or what is left of it where no axis splits it.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * table.nbytes


def temporaries(T, V, D, chunk, grad, dtype=jnp.float32):
    x = jax.ShapeDtypeStruct((1, T, D), dtype)
    table = jax.ShapeDtypeStruct((V, D), dtype)
    labels = jax.ShapeDtypeStruct((1, T), jnp.int32)
    run = lambda x, table, labels: cross_entropy(x, table, labels, chunk=chunk).sum()  # noqa: E731
    run = jax.value_and_grad(run, grad) if grad else run
    return jax.jit(run).lower(x, table, labels).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("grad", [(), (0,), (0, 1)], ids=["values", "frozen table", "all"])
def test_memory_is_that_of_a_chunk(grad):
    """Not of the vocabulary: one four times as large takes no more."""
    T, D, chunk = 256, 32, 512
    small, large = (temporaries(T, V, D, chunk, grad) for V in (8192, 32768))
    assert large - small < 1 << 16
    with_a_rest = temporaries(T, 32768, D, chunk - 32, grad)
    assert max(large, with_a_rest) < 3 * 4 * T * chunk + 3 * 4 * (T + chunk) * D


@pytest.mark.parametrize("chip", [*nightly("v5e", "v6e")])
def test_memory_on_a_tpu(chip):
    """Gemma 3 4B's head: beside the gradients, a tile of logits and dx in float32."""
    pytest.importorskip("libtpu", reason="the compiler comes with the plan extra: gemma-jax[plan]")
    B, T, D, V, chunk = 1, 2048, 2560, 262_208, 8192
    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((V, D), jnp.bfloat16)
    labels = jax.ShapeDtypeStruct((B, T), jnp.int32)

    def run(x, table, labels):
        total = lambda x, table: cross_entropy(x, table, labels, chunk=chunk).sum()  # noqa: E731
        return jax.value_and_grad(total, (0, 1))(x, table)

    memory = lower(run, chip, x, table, labels).compile().memory_analysis()
    tile, rows = 4 * B * T * chunk, 4 * chunk * D
    assert memory.temp_size_in_bytes < 1.5 * tile + 2 * rows + 2 * 4 * B * T * D


def test_chunks_are_chosen_by_the_number_of_tokens():
    V, D = 262_144, 64
    few, some, many = (default_chunk(tokens, D, V) for tokens in (1, 128, 10**6))
    assert few == default_chunk(D, D, V) and 1024 == many < some < few < V
    assert default_chunk(0, D, 100) == 100


def test_misuse_is_refused():
    x, table, labels = operands()
    call = partial(cross_entropy, x, table, labels)
    for options, message in (
        ({"implementation": "fast"}, "unknown cross-entropy implementation='fast'"),
        ({"soft_cap": 0.0}, "soft_cap=0.0 must be positive"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"weights_BT": jnp.ones(5)}, r"weights of shape \(5,\) do not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**options)
    with pytest.raises(ValueError, match=r"x must be \[B, T, D\] and the table \[V, D\]"):
        cross_entropy(x, table[:, :5], labels)
    with pytest.raises(ValueError, match="a table holds floats, got int8; whole numbers .* are a"):
        cross_entropy(x, table.astype(jnp.int8), labels)
    with pytest.raises(ValueError, match="labels must be integers"):
        cross_entropy(x, table, labels.astype(jnp.float32))
