"""A pass that computes only what is read: the same numbers as the full pass, for less work."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from marks import nightly

import gemma_jax as gj
from gemma_jax import Batch, forward, init_cache
from gemma_jax.decoder.skipping import last_with_keys, may_skip
from gemma_jax.decoder.soft_tokens import SoftTokens
from gemma_jax.inference.decode import advance
from gemma_jax.inference.prefill import PrefillChunk, PromptRow, prefill_chunk
from gemma_jax.inference.session import Session
from gemma_jax.nn.layer_groups import group_layers
from gemma_jax.placement import empty_cache, shard
from gemma_jax.sharding import make_mesh
from gemma_jax.training.trainable import trainable

ATOL = 2e-5  # as in test_invariance.py; mistakes show at 0.1
LENGTHS = np.array([2 * tiny.WINDOW + 3, 5, 2 * tiny.WINDOW])
CONFIGS = {
    "gemma3n": lambda: tiny.gemma3n(6, 3),
    "small gemma3n": lambda: tiny.gemma3n(4, 1),  # the layer with the last keys lends none
    "gemma4": tiny.gemma4,
    "gemma2": tiny.gemma2,  # the last layer ends a period
    "gemma": tiny.gemma1,  # the last layer is one of three alike
    "gemma3": lambda: tiny.gemma3(4),
    "one layer": lambda: tiny.gemma3(1),
}


def ragged(cfg, start=0):
    """A row as long as the batch, and two with padding behind their text."""
    tokens = tiny.tokens(cfg, 3, LENGTHS.max(), seed=start)
    places = np.arange(LENGTHS.max())
    return Batch(tokens, np.where(places < LENGTHS[:, None], start + places, -1))


def last_of(logits):
    return np.asarray(logits)[np.arange(3), LENGTHS - 1]


def assert_same_caches(ours, theirs):
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, atol=ATOL)


@pytest.mark.parametrize(
    "name, layout",
    [
        *(("gemma3n", "scan"), ("gemma2", "scan"), ("gemma", "scan"), ("one layer", "scan")),
        ("small gemma3n", "unrolled"),
        ("gemma4", "scan"),
        *nightly(("gemma3n", "unrolled"), ("gemma2", "unrolled"), ("gemma4", "unrolled")),
        *nightly(("gemma3", "scan"), ("gemma3", "unrolled")),
    ],
)
def test_the_last_logits_and_the_cache_are_those_of_the_full_pass(name, layout):
    """Rows of different lengths, in two chunks; the first is read for its keys alone."""
    model = tiny.model(cfg := CONFIGS[name](), layout)
    assert may_skip(model, 2, "last", ()) and last_with_keys(cfg.layers) < len(cfg.layers)
    cache = init_cache(cfg, model.layer_groups, 3, 64, "float32")
    whole = forward(model, ragged(cfg), cache=cache)
    first = forward(model, ragged(cfg), cache=cache, logits="last")
    np.testing.assert_allclose(first.logits[:, 0], last_of(whole.logits), atol=ATOL)
    assert_same_caches(first.cache, whole.cache)
    unread = forward(model, ragged(cfg), cache=cache, logits="none")
    assert unread.logits is None
    assert_same_caches(unread.cache, whole.cache)
    after = ragged(cfg, start=int(LENGTHS.max()))
    second = forward(model, after, cache=unread.cache, logits="last")
    full = forward(model, after, cache=whole.cache)
    np.testing.assert_allclose(second.logits[:, 0], last_of(full.logits), atol=ATOL)
    assert_same_caches(second.cache, full.cache)


@pytest.mark.parametrize("kind", ["plain", "documents", "widths", "int8 cache"])
def test_every_kind_of_batch(kind):
    model = tiny.model(cfg := CONFIGS["gemma3n"]())
    batch, cache = Batch(tiny.tokens(cfg, 3, 20)), None
    if kind == "documents":
        batch = replace(batch, documents_BT=np.arange(20)[None] // np.array([[7], [20], [19]]))
    elif kind == "widths":
        batch = replace(batch, ffn_widths_L=np.arange(10, 10 + len(cfg.layers)))
    elif kind == "int8 cache":
        cache = init_cache(cfg, model.layer_groups, 3, 64, "int8")
    whole = forward(model, batch, cache=cache)
    last = forward(model, batch, cache=cache, logits="last")
    np.testing.assert_allclose(last.logits[:, 0], whole.logits[:, -1], atol=ATOL)


@pytest.mark.parametrize("shown", [4, 9])
def test_blocks_that_see_both_ways(shown):
    """The last real token lies in a block of soft tokens, or behind it."""
    cfg = tiny.gemma3(4, window=3)
    model = tiny.model(cfg)
    index = np.full((1, 12), -1, np.int32)
    index[0, 2:7] = np.arange(5)
    soft_ITD = np.random.default_rng(0).standard_normal((1, 5, cfg.d_model)).astype(np.float32)
    soft = SoftTokens(embeddings_ITD=soft_ITD, index_BT=index, block_BT=(index >= 0) * 1)
    places = np.arange(12)[None]
    batch = Batch(tiny.tokens(cfg, 1, 12), np.where(places <= shown, places, -1), soft=soft)
    whole = forward(model, batch).logits[0, shown]
    np.testing.assert_allclose(forward(model, batch, logits="last").logits[0, 0], whole, atol=ATOL)


@pytest.mark.parametrize(
    "axes", [dict(data=2, tensor=2), *nightly(dict(sequence=2, tensor=2), dict(tensor=4))]
)
def test_meshes(axes):
    cfg = CONFIGS["small gemma3n"]()
    cfg = replace(cfg, per_layer=replace(cfg.per_layer, vocab_size=88))
    model = tiny.model(cfg)
    split = shard(model, make_mesh(cfg, jax.devices()[:4], **axes))
    batch = Batch(tiny.tokens(cfg, 4, 20), np.tile(np.arange(20), (4, 1)))
    whole = forward(model, batch)
    last = forward(split, batch, cache=empty_cache(split, 4, 64), logits="last")
    np.testing.assert_allclose(last.logits[:, 0], whole.logits[:, -1], atol=ATOL)


@pytest.mark.parametrize("name", ["small gemma3n", *nightly("gemma3n", "gemma2", "gemma3")])
def test_generation_is_greedy_decoding(name):
    """Prompts of one chunk and of three: what is chosen is what the full pass would choose."""
    model = tiny.model(cfg := CONFIGS[name]())
    prompts = [tiny.tokens(cfg, 1, n, seed=n)[0].tolist() for n in (40, 9, 16)]
    session = Session(model, 3, 64, chunk=16)
    session.prefill(prompts, max_new_tokens=5)
    lines = np.zeros((3, 45), np.int32)
    for line, prompt, chosen in zip(lines, prompts, session.decode(5)):
        line[: len(prompt) + 5] = [*prompt, *chosen]
    best = np.argmax(forward(model, lines).logits, -1)
    for line, prompt, chosen in zip(best, prompts, session.chosen):
        assert line[len(prompt) - 1 : len(prompt) + 4].tolist() == chosen


def test_a_chunk_that_no_row_ends_in_has_no_logits():
    cfg = CONFIGS["gemma3n"]()
    row = PromptRow.of(list(range(3, 35)), 0, None, ())
    chunks = [prefill_chunk([row], [piece]) for piece in row.cuts(16)]
    assert chunks[0].ends_B is None and chunks[1].ends_B.tolist() == [True]
    model = tiny.model(cfg, "unrolled")
    state = Session(model, 1, 64)._state

    def operations(chunk: PrefillChunk) -> float:
        return advance.lower(model, state, chunk, loop=False).cost_analysis()["flops"]

    middle, final = map(operations, chunks)
    head = 2 * cfg.vocab_size * cfg.d_model
    assert middle < final - head, "nor the layers that share keys and values"


def deep(layers, num_shared) -> tuple[gj.Gemma, np.ndarray]:
    """A model of that depth, a little wider than the others, so that matrices matter."""
    cfg = tiny.gemma3n(layers, num_shared)
    specs = tuple(replace(spec, d_ff=512) for spec in cfg.layers)
    cfg = replace(cfg, layers=specs, d_model=64)
    return gj.decoder.model.abstract_model(cfg, layout="unrolled"), tiny.tokens(cfg, 1, 32)


def operations(model, ids, logits) -> float:
    program = jax.jit(lambda model: forward(model, ids, logits=logits).logits)
    return program.lower(model).cost_analysis()["flops"]


def test_less_work():
    """35 layers of which 15 share, as in Gemma 3n E4B: 19 and some keys and values are left."""
    model, ids = deep(35, 15)
    head = 2 * ids.size * model.cfg.vocab_size * model.cfg.d_model
    ratio = (operations(model, ids, "all") - head) / operations(model, ids, "last")
    assert 1.5 < ratio < 35 / 19
    model, ids = deep(3, 0)  # the last layer keeps its keys and values
    assert 1.2 < operations(model, ids, "all") / operations(model, ids, "last") < 3 / 2


@pytest.mark.parametrize("name", ["layer_outputs", "final_norm", "attention_weights"])
def test_captures_have_all_tokens(name):
    model = tiny.model(cfg := CONFIGS["gemma3n"]())
    ids = tiny.tokens(cfg, 2, 9)
    assert may_skip(model, 9, "last", ("per_layer_inputs",))
    assert not may_skip(model, 9, "last", ("per_layer_inputs", name))
    all_, last = (
        forward(model, ids, logits=which, capture=name).captured[name] for which in ("all", "last")
    )
    for one, other in zip(jax.tree.leaves(all_), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(one, other, atol=ATOL)


def test_what_is_never_skipped():
    class OwnBlock(gj.Block):
        """It may look at other tokens in ways of its own."""

    class OwnFeedForward(nnx.Module):
        """So may a part of one."""

    plain = gj.decoder.model.abstract_model(cfg := tiny.gemma3(3))
    own = gj.decoder.model.abstract_model(cfg, block=OwnBlock)
    assert may_skip(plain, 2, "last", ()) and not may_skip(own, 2, "last", ())
    assert not may_skip(plain, 2, "all", ()), "the check of drafts"
    assert not may_skip(plain, 1, "last", ()), "a step of decoding"
    assert not may_skip(plain, 2, "none", ("final_norm",)), "losses"
    changed = tiny.model(cfg)  # a finished model, the one above is shared
    changed.blocks[0][0].ffn = OwnFeedForward()
    assert not may_skip(changed, 2, "last", ()), "a part of somebody's own"


@pytest.mark.parametrize("name", ["gemma", *nightly("gemma3n")])
def test_gradients_of_the_last_logits(name):
    """Through a scan that leaves out the last layer of its stack."""
    model = tiny.model(cfg := CONFIGS[name]())
    trained, frozen, join = trainable(model)
    ids = tiny.tokens(cfg, 2, 9)

    @jax.jit
    def gradients(trained):
        def score(trained, logits):
            out = forward(join(trained, frozen), ids, logits=logits)
            return jnp.sum(jnp.sin(out.logits[:, -1]))

        return [jax.grad(score)(trained, logits) for logits in ("all", "last")]

    full, skipped = gradients(trained)
    for path, expected in full.items():
        largest = float(jnp.abs(expected).max())
        np.testing.assert_allclose(
            skipped[path], expected, atol=ATOL * max(1, largest), err_msg=str(path)
        )


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_stretches_of_groups_are_the_layers_asked_for(layout):
    groups = group_layers(tiny.gemma3(17).layers, layout)
    for start in range(18):
        for stop in range(start, 18):
            found = [
                group.layer_index(position, repeat)
                for group in groups
                for places, repeats in group.stretches(range(start, stop))
                for repeat in repeats
                for position in range(len(group.period))[places]
            ]
            assert found == list(range(start, stop))
