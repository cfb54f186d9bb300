"""Which examples share a row; and that sharing one changes neither loss nor gradients."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from examples_on_disk import reader_cfg, seer_cfg
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import nightly

from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.training.data.assemble import assemble
from gemma_jax.training.data.documents import Document, Run
from gemma_jax.training.data.packing import METHODS, pack
from gemma_jax.training.objectives import next_token

T = 24
sizes = st.lists(st.tuples(st.integers(1, T), st.integers(0, 3)), min_size=1, max_size=40)


@pytest.mark.parametrize("method", METHODS)
@given(sizes=sizes)
@settings(max_examples=60, deadline=None)
def test_every_example_is_in_one_row_and_fits(method, sizes):
    lengths, items = (np.array(numbers) for numbers in zip(*sizes))
    rows = pack(lengths, items[:, None], T, np.array([4]), method)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    if method != "off":
        assert all(lengths[row].sum() <= T and items[row].sum() <= 4 for row in rows)
    if method == "in_order":
        assert [i for row in rows for i in row] == list(range(len(sizes)))
    assert rows == pack(lengths, items[:, None], T, np.array([4]), method)


def test_rows_by_hand():
    lengths = np.array([6, 5, 4, 3, 2, 7])
    none = np.zeros((6, 0), int), 10, np.zeros(0, int)
    assert pack(lengths, *none, "in_order") == [[0], [1, 2], [3, 4], [5]]
    assert pack(lengths, *none, "first_fit") == [[0, 2], [1, 3, 4], [5]]
    assert pack(lengths, *none, "best_fit") == [[5, 3], [0, 2], [1, 4]]
    assert pack(lengths, *none, "off") == [[i] for i in range(6)]


def test_more_open_rows_than_are_looked_through(monkeypatch):
    """The fullest is closed; nothing is lost."""
    monkeypatch.setattr("gemma_jax.training.data.packing.OPEN_ROWS", 3)
    lengths = np.random.default_rng(0).integers(1, T, 200)
    rows = pack(lengths, np.zeros((200, 0), int), T, np.zeros(0, int), "best_fit")
    assert sorted(i for row in rows for i in row) == list(range(200))
    assert all(lengths[row].sum() <= T for row in rows)


def test_many_examples_pack_well():
    lengths = np.random.default_rng(0).integers(16, 512, 20_000)
    rows = pack(lengths, np.zeros((20_000, 0), int), 2048, np.zeros(0, int), "best_fit")
    assert lengths.sum() / (len(rows) * 2048) > 0.99


# ---------------------------------------------------------------------------------------------


def document(random, length: int, images: int, cfg) -> Document:
    """Random ids and weights, with images of random pixels in it."""
    ids = random.integers(8, 500, length).astype(np.int32)
    trained = random.random(length) < 0.6
    runs = []
    for i in range(images):
        vision, start = cfg.vision, 2 + 7 * i
        ids[start - 1 : start + 5] = [
            vision.start_token,
            *[vision.image_token] * 4,
            vision.end_token,
        ]
        trained[start - 1 : start + 5] = False
        runs.append(Run("image", start, 4, random.standard_normal((3, 56, 56), np.float32)))
    trained[0], trained[-1] = False, True
    return Document(ids, trained, tuple(runs))


@pytest.fixture(scope="module")
def losses():
    """Loss and gradient norms of batches, one program per family and shape."""
    cfgs = {"text": reader_cfg, "3n": tiny.gemma3n, "images": seer_cfg}
    models = {family: cache(lambda cfg=cfg: tiny.model(cfg())) for family, cfg in cfgs.items()}

    @jax.jit
    def value_and_grad(model, batch):
        (value, metrics), grads = jax.value_and_grad(next_token, has_aux=True)(model, batch)
        return value, metrics["tokens"], grads

    return models, value_and_grad


def batches(documents, cfg, T):
    """The same documents packed into the first of several rows, and one to a row."""
    images = max(1, sum(d.count("image") for d in documents))
    common = dict(modalities=modalities_of(cfg), shapes={"image": (3, 56, 56)})
    has_images = any(d.runs for d in documents)
    most = {"image": images} if has_images else {}
    empty = [[]] * (len(documents) - 1)
    packed = assemble([documents, *empty], T, most=most, **common)
    return packed, assemble([[d] for d in documents], T, most=most, **common)


@pytest.mark.parametrize("family", ["images", *nightly("text", "3n")])
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_a_packed_row_is_its_documents(losses, family, data):
    """Loss and every gradient; with windows of 3 and 8 tokens, images of 4 that see both ways, and
    rows with nothing in them."""
    models, value_and_grad = losses
    model, T = models[family](), 48
    images = [0, 1, 2] if family == "images" else [0, 0, 0]
    images = data.draw(st.permutations(images))
    lengths = [data.draw(st.integers(8 * n or 2, 8 * n + 8), label="length") for n in images]
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    top = min(model.cfg.vocab_size, 500)
    documents = [document(random, *sizes, model.cfg) for sizes in zip(lengths, images)]
    for one in documents:
        one.ids[one.ids < 500] %= top
    packed, separate = batches(documents, model.cfg, T)
    (loss, tokens, grads), expected = (value_and_grad(model, b) for b in (packed, separate))
    assert tokens == expected[1] == sum(d.trained.sum() for d in documents)
    np.testing.assert_allclose(loss, expected[0], rtol=2e-6)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected[2]))
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[2])):
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale)


def test_a_batch_of_nothing_moves_nothing(losses):
    models, value_and_grad = losses
    model = models["images"]()
    most, shapes = {"image": 3}, {"image": (3, 56, 56)}
    nothing = assemble([[]] * 3, 48, modalities=modalities_of(model.cfg), most=most, shapes=shapes)
    loss, tokens, grads = value_and_grad(model, nothing)
    assert loss == tokens == 0
    assert all(not np.any(g) for g in jax.tree.leaves(grads))
