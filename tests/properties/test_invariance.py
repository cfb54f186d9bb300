"""What must not change a result: how the tokens reach the model, and how the model is laid out."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from marks import nightly

from gemma_jax import Runtime, forward, generate, init_cache
from gemma_jax.decoder.batch import Batch

LENGTH = 4 * tiny.WINDOW + 3  # several wraps of every ring
ROWS = 3  # in every test that can: other shapes would be other programs
ATOL = 2e-5  # ten times the rounding of float32 sums in another order; mistakes show at 0.1


@pytest.fixture(scope="module", params=["gemma2", "gemma3n", "gemma4", *nightly("gemma", "gemma3")])
def model(request):
    return tiny.model(tiny.FAMILIES[request.param]())


def full(model, ids, positions=None):
    return np.asarray(forward(model, Batch(ids, positions)).logits)


def in_chunks(model, ids, cuts, positions=None, slack=0):
    """Logits of consecutive passes over one cache."""
    cache = init_cache(model.cfg, model.layer_groups, len(ids), 64, jnp.float32, slack=slack)
    parts = []
    for start, end in zip([0, *cuts], [*cuts, ids.shape[1]]):
        pos = None if positions is None else positions[:, start:end]
        out = forward(model, Batch(ids[:, start:end], pos), cache=cache)
        cache = out.cache
        parts.append(np.asarray(out.logits))
    return np.concatenate(parts, axis=1)


def test_families_by_day_have_every_feature():
    """Whatever a family switches on, and every kind of layer, is in Gemma 2, 3n or 4."""

    def features(*families):
        cfgs = [tiny.FAMILIES[family]() for family in families]
        fields = {f.name for c in cfgs for f in dataclasses.fields(c) if getattr(c, f.name)}
        return fields | {(s.kind, s.kv, bool(s.sparsity)) for c in cfgs for s in c.layers}

    assert features("gemma2", "gemma3n", "gemma4") >= features(*tiny.FAMILIES)


def test_shapes(model):
    out = forward(
        model, tiny.tokens(model.cfg, 2, 5), capture=("layer_outputs", "attention_weights")
    )
    dims = chex.Dimensions(**model.cfg.sizes, B=2, T=5)
    chex.assert_shape(out.logits, dims["BTV"])
    streams = "LABTD" if model.cfg.altup else "LBTD"
    chex.assert_shape(out.captured["layer_outputs"], dims[streams])
    chex.assert_shape(out.captured["attention_weights"], (*dims["LBN"], 5, 5))


@pytest.mark.parametrize(
    "cuts",
    [
        [2 * tiny.WINDOW + 1, 4 * tiny.WINDOW + 2],
        *nightly([tiny.WINDOW], [tiny.WINDOW - 1, 17, 18], [17, 18, 19]),
    ],
)
def test_chunks_equal_one_pass(model, cuts):
    ids = tiny.tokens(model.cfg, ROWS, LENGTH)
    np.testing.assert_allclose(in_chunks(model, ids, cuts), full(model, ids), atol=ATOL)


def test_token_by_token_equals_one_pass(model):
    """Every ring wraps four times on the way."""
    ids = tiny.tokens(model.cfg, ROWS, LENGTH)
    cuts = list(range(1, LENGTH))
    np.testing.assert_allclose(in_chunks(model, ids, cuts), full(model, ids), atol=ATOL)


def test_slack_lets_a_ring_take_several_tokens_at_once(model):
    ids = tiny.tokens(model.cfg, ROWS, LENGTH)
    cuts = list(range(3, LENGTH, 4))  # three, and pieces of four
    expected = full(model, ids)
    np.testing.assert_allclose(in_chunks(model, ids, cuts, slack=3), expected, atol=ATOL)


def test_a_ring_equals_a_full_cache_under_a_mask():
    """A window as long as the cache keeps every key; masking alone must then give the same."""
    cfg = tiny.gemma3()
    model = tiny.model(cfg)
    ids = tiny.tokens(cfg, 1, LENGTH)
    ring = init_cache(cfg, model.layer_groups, 1, 64, jnp.float32)
    whole = init_cache(cfg, model.layer_groups, 1, 64, jnp.float32, slack=64 - tiny.WINDOW)
    assert set(ring.positions) == {tiny.WINDOW, 64} and set(whole.positions) == {64}
    for start in range(0, LENGTH, 5):
        ring_out = forward(model, ids[:, start : start + 5], cache=ring)
        whole_out = forward(model, ids[:, start : start + 5], cache=whole)
        np.testing.assert_allclose(ring_out.logits, whole_out.logits, atol=ATOL)
        ring, whole = ring_out.cache, whole_out.cache


@pytest.mark.parametrize("cuts", [[], [10, 20]])
def test_padding_on_either_side_changes_nothing(model, cuts):
    ids = tiny.tokens(model.cfg, ROWS, LENGTH)
    lengths = [LENGTH, 13, 6]
    expected = full(model, ids)
    for left in (True, False):
        padded, positions = np.zeros_like(ids), np.full_like(ids, -1)
        spans = [slice(LENGTH - n, None) if left else slice(0, n) for n in lengths]
        for i, (n, span) in enumerate(zip(lengths, spans)):
            padded[i, span], positions[i, span] = ids[i, :n], np.arange(n)
        actual = (
            in_chunks(model, padded, cuts, positions) if cuts else full(model, padded, positions)
        )
        for i, (n, span) in enumerate(zip(lengths, spans)):
            np.testing.assert_allclose(actual[i, span], expected[i, :n], atol=ATOL)


def test_a_row_is_independent_of_its_batch(model):
    ids = tiny.tokens(model.cfg, ROWS, LENGTH)
    together = full(model, ids)
    for i in range(ROWS):
        np.testing.assert_allclose(together[i], full(model, ids[i : i + 1])[0], atol=ATOL)


def test_scan_equals_unrolled(model):
    ids = tiny.tokens(model.cfg, ROWS, LENGTH)
    unrolled = tiny.relayout(model, "unrolled")
    assert (
        len(unrolled.layer_groups)
        == 1
        < len(model.layer_groups) + model.layer_groups[0].repeats - 1
    )
    np.testing.assert_allclose(full(unrolled, ids), full(model, ids), atol=ATOL)


def test_gradients_do_not_depend_on_the_layout():
    cfg = tiny.gemma3()
    ids = tiny.tokens(cfg, 2, 20)

    def loss(model):
        return jnp.mean(jnp.square(forward(model, ids).logits))

    model = tiny.model(cfg)
    scan, unrolled = jax.grad(loss)(model), jax.grad(loss)(tiny.relayout(model, "unrolled"))
    back = tiny.relayout(unrolled, "scan")
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(scan))
    for a, b in zip(jax.tree.leaves(scan), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL * largest)


GENERATION = tiny.gemma3(3)
PROMPTS = [tiny.tokens(GENERATION, 1, n, seed=n)[0].tolist() for n in (3, 40, 11)]


def written(model, prompts, **options):
    return [done.token_ids for done in generate(model, None, prompts, max_new_tokens=20, **options)]


def test_sampled_text_is_the_same_alone_and_batched():
    model = tiny.model(GENERATION)
    sampled = dict(temperature=1.0, top_k=20, top_p=0.9, min_p=0.01, seed=5)
    alone = [written(model, [prompt], **sampled)[0] for prompt in PROMPTS]
    assert written(model, PROMPTS, **sampled) == alone


@pytest.mark.parametrize(
    "way",
    [{"chunk": 16}, *nightly({"on_text": lambda row, text: None})],
    ids=["chunked", "streamed"],
)
def test_greedy_text_is_the_same_chunked_and_streamed(way):
    model = tiny.model(GENERATION)
    assert written(model, PROMPTS, **way) == written(model, PROMPTS)


@pytest.mark.nightly
def test_greedy_text_is_the_same_alone_and_batched():
    model = tiny.model(GENERATION)
    assert written(model, PROMPTS) == [written(model, [prompt])[0] for prompt in PROMPTS]


def test_generated_tokens_are_the_argmax_of_a_full_pass():
    cfg = GENERATION
    model = tiny.model(cfg)
    prompt = tiny.tokens(cfg, 1, 11)[0].tolist()
    done = generate(model, None, [prompt], max_new_tokens=30)[0]
    ids = np.array([prompt + done.token_ids[:-1]], np.int32)
    logits = full(model, ids)[0, len(prompt) - 1 :]
    assert logits.argmax(axis=-1).tolist() == done.token_ids
    log_probs = jax.nn.log_softmax(logits)[np.arange(30), done.token_ids]
    np.testing.assert_allclose(done.log_probs, log_probs, atol=ATOL)


def test_reference_attention_gives_the_same_model():
    cfg = tiny.gemma3()
    ids = tiny.tokens(cfg, 2, LENGTH)
    model = tiny.model(cfg)
    reference = tiny.model(cfg, attention_impl="reference")
    assert reference.runtime == Runtime(attention_impl="reference")
    np.testing.assert_allclose(full(reference, ids), full(model, ids), atol=ATOL)
