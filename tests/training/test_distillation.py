"""Divergences in blocks against their dense definition in float64, and the objective of models."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from intermediates import largest_intermediate
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from marks import nightly

import gemma_jax as gj
from gemma_jax.quantisation import quantise
from gemma_jax.training.distillation import DistillBatch, distill
from gemma_jax.training.divergence import Divergence, Hidden, TopTokens, token_divergences
from gemma_jax.training.model_pair import ModelPair, pair_with
from gemma_jax.training.objectives import TrainBatch, next_token
from gemma_jax.training.step import make_step
from gemma_jax.training.trainable import trainable
from gemma_jax.weights.protocol import dense

FORMS = [{}, {"top_k": 5}, {"top_k": 5, "form": "renormalised"}, {"top_k": 5, "form": "full"}]
RULES = [
    {"kind": kind, "temperature": temperature, **form}
    for form in FORMS
    for kind in ("forward_kl", "reverse_kl", "jsd")
    for temperature in (1.0, 2.5)
    if form.get("form") != "full" or kind == "forward_kl"
]
# Every form and kind by day, at one temperature and the other by turns.
BY_DAY = [rule for i, rule in enumerate(RULES) if i % 4 in (0, 3)]
CFG = replace(tiny.gemma1(), layers=tiny.gemma1().layers[:2])
TOKENS = tiny.tokens(CFG, 2, 9)
compiled = jax.jit(token_divergences, static_argnames=("divergence", "block"))


def hidden(D, V=40, B=2, T=7, seed=0, cap=None, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    x, table = random.standard_normal((B, T, D)), random.standard_normal((V, D))
    return Hidden(jnp.asarray(x, dtype), jnp.asarray(table, dtype), cap)


def log_probs(given, temperature):
    """Over the whole vocabulary, dense, float64 in and out."""
    logits = given.x_BTD @ given.table.T
    logits = (
        logits if given.soft_cap is None else given.soft_cap * jnp.tanh(logits / given.soft_cap)
    )
    return jax.nn.log_softmax(logits / temperature)


def definition(student, teacher, kind, temperature, top_k=None, form="tail"):
    """As it reads in a textbook; probabilities of the rest as one minus the others."""
    logp, logq = log_probs(teacher, temperature), log_probs(student, temperature)
    p, q = jnp.exp(logp), jnp.exp(logq)
    if top_k is not None:
        ids = jnp.argsort(-p, axis=-1)[..., :top_k]
        p, q = (jnp.take_along_axis(x, ids, axis=-1) for x in (p, q))
        if form == "tail":
            p, q = (jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
        else:
            p = p / p.sum(-1, keepdims=True)
            q = q / q.sum(-1, keepdims=True) if form == "renormalised" else q
    kl = lambda p, q: jnp.sum(p * (jnp.log(p) - jnp.log(q)), axis=-1)  # noqa: E731
    m = (p + q) / 2
    return {"forward_kl": kl(p, q), "reverse_kl": kl(q, p), "jsd": (kl(p, m) + kl(q, m)) / 2}[kind]


def values_and_gradients(divergences, student, teacher):
    """Each token counts differently."""

    def total(x, table):
        each = divergences(replace(student, x_BTD=x, table=table), teacher)
        return jnp.sum(each * jnp.cos(jnp.arange(each.size)).reshape(each.shape)), each

    run = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, each), gradients = run(student.x_BTD, student.table)
    return each, *gradients


def in_float64(divergences, *sides):
    with jax.enable_x64(True):
        wide = [replace(s, x_BTD=np.float64(s.x_BTD), table=np.float64(s.table)) for s in sides]
        wide = [replace(s, x_BTD=jnp.array(s.x_BTD), table=jnp.array(s.table)) for s in wide]
        return [np.asarray(x) for x in values_and_gradients(divergences, *wide)]


@pytest.mark.parametrize(
    "rule",
    [*BY_DAY, *nightly(*(rule for rule in RULES if rule not in BY_DAY))],
    ids=lambda rule: "-".join(map(str, rule.values())),
)
def test_blocks_are_the_definition(rule):
    """Student and teacher differ in width and soft cap; the last block is not full."""
    student, teacher = hidden(12, cap=4.0), hidden(6, seed=1, cap=3.0)
    divergences = partial(token_divergences, divergence=Divergence(**rule), block=3)
    ours = values_and_gradients(divergences, student, teacher)
    theirs = in_float64(partial(definition, **rule), student, teacher)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=3e-5, rtol=1e-4)


def test_a_tail_of_almost_nothing():
    """The student is all but sure: one minus the others would be noise, or nothing."""
    student, teacher = hidden(4), hidden(4, seed=1)
    sure = replace(student, x_BTD=4 * student.x_BTD)
    rule = Divergence("reverse_kl", top_k=12)
    ours = token_divergences(sure, teacher, rule)
    theirs, *_ = in_float64(partial(definition, kind="reverse_kl", temperature=1, top_k=12), sure,
                            teacher)  # fmt: skip
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    alone = values_and_gradients(
        partial(token_divergences, divergence=Divergence("forward_kl", top_k=39)),
        replace(student, x_BTD=30 * student.x_BTD),
        teacher,
    )
    assert all(np.isfinite(x).all() for x in alone)


@given(
    st.integers(0, 10**6),
    st.sampled_from([1, 4, 8]),
    st.sampled_from([1, 7, 39]),
    st.sampled_from(RULES[:6]),
)
@settings(max_examples=6, deadline=None)
def test_what_divergences_are(seed, block, top_k, rule):
    student, teacher = hidden(5, T=6, seed=seed), hidden(3, T=6, seed=seed + 1)
    whole = compiled(student, teacher, Divergence(**rule))
    blocks = compiled(student, teacher, Divergence(**rule), block=block)
    np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-6)
    tail = compiled(student, teacher, Divergence(**rule, top_k=top_k))
    # To put events together loses something, and never adds.
    assert (tail <= whole + 1e-5).all() and (tail >= -1e-6).all()
    same = compiled(student, student, Divergence(**rule, top_k=top_k))
    np.testing.assert_allclose(same, 0, atol=2e-6)


@pytest.mark.parametrize("form", ["tail", "renormalised", "full"])
def test_a_stored_top_is_the_teacher(form):
    student, teacher = hidden(12), hidden(6, seed=1)
    logps, ids = jax.lax.top_k(log_probs(teacher, 1.0), 5)
    for order in (slice(None), slice(None, None, -1)):
        top = TopTokens(ids[..., order], logps[..., order])
        stored = partial(token_divergences, divergence=Divergence(form=form), block=3)
        computed = partial(token_divergences, divergence=Divergence(form=form, top_k=5))
        ours = values_and_gradients(stored, student, top)
        theirs = values_and_gradients(computed, student, teacher)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-4)


def test_the_table_of_bfloat16_learns_from_a_sum_in_float32():
    """Of 64 blocks, each of which would be rounded on its own otherwise."""
    student, teacher = hidden(8, B=1, T=64, dtype=jnp.bfloat16), hidden(8, B=1, T=64, seed=1)
    divergences = partial(token_divergences, block=1)
    wide = replace(student, x_BTD=student.x_BTD.astype(jnp.float32),
                   table=student.table.astype(jnp.float32))  # fmt: skip
    _, dx, dtable = values_and_gradients(divergences, student, teacher)
    _, _, exact = values_and_gradients(divergences, wide, teacher)
    assert dx.dtype == dtable.dtype == jnp.bfloat16
    error = np.abs(np.asarray(dtable, np.float32) - exact)
    assert error.mean() < 2**-8 * np.abs(exact).mean()


def test_logits_never_exist_at_one_time():
    student, teacher = hidden(8, V=512, T=32), hidden(8, V=512, T=32, seed=1)
    for rule in ({}, {"top_k": 4}, {"kind": "jsd"}):
        run = partial(token_divergences, divergence=Divergence(**rule), block=4)
        size = largest_intermediate(partial(values_and_gradients, run), student, teacher)
        assert size <= 2 * 4 * 512


@pytest.mark.parametrize("rule", [{}, {"top_k": 4}], ids=str)
def test_on_a_mesh_it_is_the_same(rule):
    """Rows over two devices, the vocabulary over two."""
    student, teacher = hidden(8, V=64), hidden(8, V=64, seed=1)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    run = partial(
        values_and_gradients, partial(token_divergences, divergence=Divergence(**rule), block=3)
    )

    def split(side):
        specs = PartitionSpec("data"), PartitionSpec("tensor")
        x, table = (
            jax.device_put(array, NamedSharding(mesh, spec))
            for array, spec in zip((side.x_BTD, side.table), specs)
        )
        return replace(side, x_BTD=x, table=table)

    ours, theirs = jax.jit(run)(split(student), split(teacher)), run(student, teacher)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), ours, theirs)


@pytest.fixture(scope="module")
def models():
    wide = replace(CFG, d_model=48, final_soft_cap=5.0)
    return ModelPair(tiny.model(CFG), tiny.model(wide, seed=1))


def test_it_is_the_mean_over_the_places_that_count(models):
    documents = np.repeat([[1, 2]], [4, 5], axis=1).repeat(2, axis=0)
    read = gj.Batch(TOKENS, documents_BT=documents)
    weights = np.ones(TOKENS.shape, np.float32)
    weights[0, 2] = 0.5
    loss, metrics = distill(models, TrainBatch(read, weights_BT=weights))
    logits = [gj.forward(model, read).logits for model in (models.model, models.other)]
    logq, logp = map(jax.nn.log_softmax, logits)
    each = jnp.sum(jnp.exp(logp) * (logp - logq), axis=-1)
    counts = np.pad(weights[:, 1:], ((0, 0), (0, 1)))
    counts[:, 3] = 0  # what follows is another document
    np.testing.assert_allclose(loss, (each * counts).sum() / counts.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["tokens"], counts.sum())
    mixed, parts = distill(models, TrainBatch(read, weights_BT=weights), alpha=0.25)
    labels, _ = next_token(models.model, TrainBatch(read, weights_BT=weights))
    np.testing.assert_allclose(parts["cross_entropy"], labels, rtol=1e-5)
    np.testing.assert_allclose(mixed, 0.25 * loss + 0.75 * labels, rtol=1e-5)


def test_no_gradient_goes_through_the_teacher(models):
    gradient = jax.jit(jax.grad(lambda pair: distill(pair, TOKENS, top_k=4)[0]))(models)
    assert not any(np.any(g) for g in jax.tree.leaves(gradient.other))
    assert all(np.any(g) for g in jax.tree.leaves(gradient.model))


def test_quantised_heads():
    """Of the teacher, and of a student whose norms alone are trained."""
    small = [quantise(tiny.model(CFG, seed=seed), "int8") for seed in (0, 1)]
    trained, frozen, join = trainable(small[0], lambda path, _: "scale" in path)

    def loss(trained):
        return distill(ModelPair(join(trained, frozen), small[1]), TOKENS, top_k=4)[0]

    assert all(np.any(gradient) for gradient in jax.jit(jax.grad(loss))(trained).values())
    activations, teacher = (hidden(CFG.d_model, V=CFG.vocab_size, seed=seed) for seed in (0, 1))
    given = replace(activations, table=small[0].embed.output.get_value())
    plain = replace(given, table=dense(given.table))
    ours, theirs = (
        [token_divergences(*sides) for sides in ((given, teacher), (teacher, given))],
        [token_divergences(*sides) for sides in ((plain, teacher), (teacher, plain))],
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_a_student_comes_to_say_what_its_teacher_does(models):
    trained, frozen, join = pair_with(trainable(models.model), models.other)
    init, step = make_step(partial(distill, top_k=8), optax.adam(1e-2), join)
    state, step = init(trained, jax.random.key(0)), jax.jit(step)
    losses = []
    for _ in range(6):
        state, metrics = step(state, frozen, TOKENS)
        losses.append(metrics["loss"])
    assert losses[-1] < 0.7 * losses[0]
    text = step.lower(state, frozen, TOKENS).as_text()  # constants are written out in full
    assert len(text) < 8 * sum(leaf.nbytes for leaf in jax.tree.leaves(models.other))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "kl"}, "kind='kl' must be 'forward_kl', 'reverse_kl' or 'jsd'"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": 96}, "top_k=96 must be at most 95, of 96 tokens"),
        ({"form": "tail"}, "form='tail' is of a top-k teacher: give top_k, too"),
        ({"top_k": 4, "form": "all"}, "form='all' must be 'tail', 'renormalised' or 'full'"),
        ({"top_k": 4, "form": "full", "kind": "jsd"}, "kind='jsd' of form='full' is not finite"),
        ({"alpha": 2}, r"alpha=2 must lie in \[0, 1\]"),
        ({"teacher": "4b"}, "teacher='4b' must be a function"),
    ],
)
def test_impossible_options_are_refused(options, message, models):
    with pytest.raises(ValueError, match=message):
        distill(models, TOKENS, **options)


def test_what_does_not_fit_is_refused(models):
    with pytest.raises(ValueError, match="expected one teacher, got none"):
        distill(models.model, TOKENS)
    other = tiny.model(replace(CFG, vocab_size=100))
    with pytest.raises(ValueError, match="one of 100 tokens, the student one of 96"):
        distill(ModelPair(models.model, other), TOKENS)
    ids = np.tile(np.arange(4), (*TOKENS.shape, 1))
    stored = DistillBatch(TOKENS, ids, np.full(ids.shape, -2.0, np.float32))
    with pytest.raises(ValueError, match="changes what is left for the tail"):
        distill(models.model, stored, temperature=2)
    with pytest.raises(ValueError, match="top_k=8 of 4 tokens that are stored"):
        distill(models.model, stored, top_k=8)
    with pytest.raises(ValueError, match="got the teacher of a ModelPair and what the teacher"):
        distill(models, stored)
