"""Optimizers: stacked layers as separate ones, decay, clipping, rates, and narrow parameters."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from marks import nightly

from gemma_jax.planning.lowering import with_shardings
from gemma_jax.sharding import TRAINING, Partition, make_mesh
from gemma_jax.training.decay import decays
from gemma_jax.training.moments import placed_like
from gemma_jax.training.optimizers import OptimizerSettings, make_optimizer
from gemma_jax.training.param_letters import Letters, letters_of, name_of
from gemma_jax.training.trainable import trainable
from gemma_jax.weights.tree import flat_params, with_params

CFG = tiny.gemma3(layers=4, every=2)
STEPS = 3
SETTINGS = {
    "adamw": OptimizerSettings(name="adamw", weight_decay=0.1),
    "adafactor": OptimizerSettings(name="adafactor", least_factored=16, weight_decay=0.1),
    "muon": OptimizerSettings(name="muon"),
    "sgd": OptimizerSettings(name="sgd", momentum=0.9),
}


def some(path, param):
    """A parameter of every kind: each is compiled once per layer."""
    return not {"k", "v", "gate", "up", "pre_ffn_norm", "post_ffn_norm"} & set(path)


def moved(model, optimizer, gradients):
    """The model after some updates by given gradients, which are shaped like models."""
    trained, frozen, join = trainable(model, some)
    update, state = jax.jit(optimizer.update), jax.jit(optimizer.init)(trained)
    for gradient in gradients:
        updates, state = update(trainable(gradient, some).trained, state, trained)
        trained = optax.apply_updates(trained, updates)
    return join(trained, frozen)


def uneven(cfg, seed):
    """A gradient whose layers differ in scale, as those of deep models do."""
    model = tiny.model(cfg, "unrolled", seed=seed)
    values = {path: param.get_value() for path, param in flat_params(model).items()}
    scale = {path: 10.0 ** (path[2] % 5 - 2) if "blocks" in path else 1.0 for path in values}
    return with_params(model, {path: scale[path] * value for path, value in values.items()})


@pytest.mark.parametrize("family", ["gemma3", *nightly("gemma3n")])
@pytest.mark.parametrize("name", SETTINGS)
def test_stacked_layers_are_moved_as_separate_ones(name, family):
    cfg = CFG if family == "gemma3" else tiny.gemma3n()
    model = tiny.model(cfg, "unrolled")
    gradients = [uneven(cfg, seed) for seed in range(1, STEPS + 1)]
    settings = replace(SETTINGS[name], rate=0.01)
    apart = moved(model, make_optimizer(settings, model, STEPS), gradients)
    stacked = tiny.relayout(model, "scan")
    together = moved(
        stacked,
        make_optimizer(settings, stacked, STEPS),
        [tiny.relayout(g, "scan") for g in gradients],
    )
    again = tiny.relayout(together, "unrolled")
    start, ours, theirs = (trainable(m, some).trained for m in (model, again, apart))
    for path, value in theirs.items():
        change = np.abs(value - start[path]).max()
        assert change > 0, name_of(path)
        np.testing.assert_allclose(ours[path], value, atol=2e-4 * change, err_msg=name_of(path))


def test_optax_alone_moves_stacked_layers_otherwise():
    """What the test above would miss if it could not fail."""
    model, gradients = tiny.model(CFG, "unrolled"), [uneven(CFG, 1)]
    adafactor = optax.adafactor(0.01, min_dim_size_to_factor=4)
    apart = moved(model, adafactor, gradients)
    together = moved(
        tiny.relayout(model, "scan"), adafactor, [tiny.relayout(g, "scan") for g in gradients]
    )
    again = tiny.relayout(together, "unrolled")
    start, ours, theirs = (trainable(m, some).trained for m in (model, again, apart))
    errors = [
        optax.tree.norm(ours[path] - value) / optax.tree.norm(value - start[path])
        for path, value in theirs.items()
    ]
    assert max(errors) > 0.1


def test_adafactor_of_one_matrix_is_that_of_optax():
    """Factored along outputs and inputs: the weight of queries as the matrix of a file."""
    model = tiny.model(CFG, "unrolled")
    settings = OptimizerSettings(name="adafactor", least_factored=16, rate=0.01)
    after = moved(model, make_optimizer(settings, model, 1), [uneven(CFG, 1)])
    path = "blocks", 0, 0, "attn", "q", "w"
    start, gradient, ours = (
        trainable(m).trained[path].reshape(64, 32) for m in (model, uneven(CFG, 1), after)
    )
    adafactor = optax.adafactor(0.01, min_dim_size_to_factor=16)
    update, _ = adafactor.update(gradient, adafactor.init(start), start)
    np.testing.assert_allclose(ours, start + update, rtol=1e-5, atol=1e-7)


def test_row_and_column_sums_are_all_that_adafactor_keeps():
    model = tiny.model(CFG, "scan")
    trained = trainable(model).trained
    sizes = {}
    for name in ("adamw", "adafactor"):
        state = make_optimizer(SETTINGS[name], model, 1).init(trained)
        sizes[name] = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes["adafactor"] < 0.2 * sizes["adamw"]


def test_muon_orthogonalises_each_layers_matrix():
    model = tiny.model(CFG, "scan")
    trained = trainable(model).trained
    optimizer = make_optimizer(OptimizerSettings(name="muon", rate=1.0), model, 1)
    gradients = trainable(tiny.relayout(uneven(CFG, 1), "scan")).trained
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(trained), trained)
    update = np.asarray(updates["blocks", 0, 0, "attn", "o", "w"])  # [L, D, N, H]
    for of_layer in update.reshape(len(update), 32, 64):
        values = np.linalg.svd(of_layer, compute_uv=False)
        assert 0.5 < values.min() <= values.max() < 1.5


def test_tables_and_norms_are_none_of_muons_matrices():
    model = tiny.model(tiny.gemma3n(), "scan")
    letters, params = letters_of(model), flat_params(model)
    maps = {name_of(p) for p, v in params.items() if letters(p, v.get_value().ndim).is_map}
    assert any("altup.predictor" in name for name in maps)
    assert not [name for name in maps if "norm" in name or "table" in name or "scale" in name]


def test_scales_and_biases_do_not_decay_by_default():
    """A bias of all heads has two letters, and is a vector in every framework."""
    params = {
        ("tower", "q", "w"): jnp.ones((3, 2, 4, 8)),
        ("tower", "q", "bias"): jnp.ones((3, 2, 4)),
        ("tower", "positions"): jnp.ones((16, 8)),
        ("norm", "scale"): jnp.ones(8),
    }
    letters = letters_of(
        dict(zip(params, [("NHD", "D"), ("NH", ""), ("QC", ""), ("D", "")], strict=True))
    )
    chosen = decays("matrices", letters, params)
    assert list(chosen.values()) == [True, False, True, False]
    assert all(decays("all", letters, params).values())
    assert not any(decays("none", letters, params).values())


def test_decay_is_chosen_by_letters_and_names():
    model = tiny.model(CFG, "scan")
    trained, letters = trainable(model).trained, letters_of(model)

    def chosen(*rules):
        return {name_of(path) for path, on in decays(rules, letters, trained).items() if on}

    assert all(".ffn." in name for name in chosen("F"))
    assert "embed.table" in chosen("matrices")
    assert chosen("matrices") - chosen("matrices", "!V") == {"embed.table"}
    assert all(".q." in name or ".k." in name for name in chosen("*.[qk].w"))
    with pytest.raises(ValueError, match=r"decay: '\*\.lora' matches none of the \d+ trained"):
        chosen("*.lora")


def test_factors_of_adapters_are_matrices_beside_their_weight():
    model = tiny.model(CFG, "scan")
    letters, path = letters_of(model), ("blocks", 0, 0, "attn", "o", "w")
    assert letters((*path, "a"), 4) == Letters("RNH", "NH", is_map=True)
    assert letters((*path, "b"), 3) == Letters("DR", "R", is_map=True)
    assert letters((*path, "magnitude"), 2).is_vector
    assert letters(("mine", "w"), 2) == Letters("__", "_", is_map=True)
    assert letters(("blocks", 0, 0, "mine"), 2).is_vector  # one vector per layer
    factors = {(*path, "a"): jnp.ones((2, 4, 4, 16)), (*path, "b"): jnp.ones((2, 32, 4))}
    for name in SETTINGS:
        settings = replace(SETTINGS[name], weight_decay=0.1, decay="all")
        optimizer = make_optimizer(settings, model, 1)
        state = jax.jit(optimizer.init)(factors)
        updates, _ = jax.jit(optimizer.update)(factors, state, factors)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, factors)


def test_gradients_are_clipped_by_the_norm_of_all():
    params = {("a",): jnp.zeros(3), ("b",): jnp.zeros((2, 2))}
    gradients = {("a",): jnp.full(3, 3.0), ("b",): jnp.full((2, 2), 4.0)}
    norm = np.sqrt(3 * 9 + 4 * 16)
    for clip, share in ((1.0, 1 / (norm + 1e-6)), (100.0, 1.0)):
        settings = OptimizerSettings(name="sgd", rate=1.0, clip=clip)
        optimizer = make_optimizer(settings, {}, 1)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        np.testing.assert_allclose(updates["b",], np.full((2, 2), -4.0 * share), rtol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_no_step_has_the_rate_zero(schedule, warmup):
    settings = OptimizerSettings(rate=0.2, schedule=schedule, warmup=warmup)
    rates = np.array([settings.rate_at(step, steps=10) for step in range(10)])
    peak = max(warmup - 1, 0)
    np.testing.assert_allclose(rates[: peak + 1], 0.2 * np.arange(1, peak + 2) / (peak + 1))
    assert (rates > 0).all() and (np.diff(rates[peak:]) <= 0).all()
    if schedule == "linear":
        np.testing.assert_allclose(np.diff(rates[peak:]), -0.2 / (10 - peak), rtol=1e-4)


def test_rates_are_taken_as_they_are_given():
    settings = OptimizerSettings(rates=(0.1, 0.3))
    assert [float(settings.rate_at(step, steps=2)) for step in range(2)] == [
        pytest.approx(0.1),
        pytest.approx(0.3),
    ]
    with pytest.raises(ValueError, match="2 rates for 3 steps"):
        make_optimizer(settings, {}, 3)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "lion"}, "'lion' must be one of: adamw, adafactor, muon, sgd"),
        ({"name": "sgd", "betas": (0.9, 0.95)}, "sgd does not read betas"),
        ({"momentum": 0.9}, "adamw does not read momentum"),
        ({"rates": (1e-3,), "warmup": 3}, "`rates` replaces warmup"),
        ({"schedule": "step"}, "schedule='step' must be one of"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0 must lie in \[0, 1\)"),
        ({"clip": 0.0}, "clip=0.0 must be above 0"),
        ({"rate": -1.0}, "rate=-1.0 must not be negative"),
        ({"rate": float("nan")}, "rate=nan must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**wrong)


def test_moments_of_narrow_parameters_are_float32():
    params = {("w",): jnp.ones((4, 4), jnp.bfloat16)}
    gradients = {("w",): jnp.full((4, 4), 0.25, jnp.bfloat16)}
    nothing = {("w",): jnp.zeros((4, 4), jnp.bfloat16)}
    optimizer = make_optimizer(OptimizerSettings(rate=1e-3), {}, 1)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    _, state = update(gradients, state, params)
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype in (jnp.float32, jnp.int32)
    second = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4, 4)]
    before = min(float(leaf.max()) for leaf in second)
    for _ in range(100):
        _, state = update(nothing, state, params)
    after = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (4, 4)]
    assert min(float(leaf.max()) for leaf in after) < 0.1 * before


@pytest.mark.parametrize("masters", ["float32", None])
def test_small_updates_add_up_in_masters_alone(masters):
    params = {("w",): jnp.ones((4, 4), jnp.bfloat16)}
    gradients = {("w",): jnp.ones((4, 4), jnp.bfloat16)}
    settings = OptimizerSettings(name="sgd", rate=1e-3, masters=masters)
    optimizer = make_optimizer(settings, {}, 1)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(100):
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    assert params["w",].dtype == jnp.bfloat16
    expected = jnp.asarray(0.9, jnp.bfloat16) if masters else 1.0
    assert (params["w",] == expected).all()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.0, 0.0)])
def test_adam_is_the_textbooks_in_float64(betas):
    """Also in the first steps, where optax's bias correction is 6e-6 off."""
    (b1, b2), random, m, v = betas, np.random.default_rng(0), 0.0, 0.0
    settings = OptimizerSettings(rate=0.1, betas=betas, eps=1e-6)
    optimizer = make_optimizer(settings, {}, 1)
    params = {("w",): jnp.zeros(8)}
    state = optimizer.init(params)
    for t in range(1, 4):
        g = random.standard_normal(8).astype(np.float32)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.astype(np.float64) ** 2
        step = 0.1 * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + 1e-6)
        updates, state = optimizer.update({("w",): jnp.asarray(g)}, state, params)
        np.testing.assert_allclose(updates["w",], -step, rtol=6e-7)


@pytest.mark.parametrize("name", SETTINGS)
def test_moments_lie_where_their_parameters_do(name):
    partition = Partition.of(make_mesh(CFG, jax.devices()[:4], fsdp=2, tensor=2), TRAINING)
    model = tiny.model(CFG, "scan")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), model)
    trained = trainable(with_shardings(shapes, partition)).trained
    state = jax.eval_shape(make_optimizer(SETTINGS[name], model, STEPS).init, trained)
    placed = placed_like(state, trained, partition.whole)
    assert set(placed.masters) == set(trained)
    for path, master in placed.masters.items():
        assert master.sharding == trained[path].sharding and master.dtype == jnp.float32
    large = [leaf for leaf in jax.tree.leaves(placed.inner) if leaf.size > 2048]
    split = [leaf for leaf in large if not leaf.sharding.is_fully_replicated]
    assert bool(split) == (name != "adafactor")
