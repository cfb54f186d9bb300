"""What a text becomes does not depend on the texts beside it, nor on how they are batched."""

import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from parity.goldens import DATA

import gemma_jax as gj
from gemma_jax.text_embedding.batches import batches, padded_length
from gemma_jax.text_embedding.embed import embed_tokens

FOLDER = DATA / "embedding" / "tiny"
NOISE = 8e-7  # of a vector of length one, in float32: ten times what float64 differs by


@pytest.fixture(scope="module")
def loaded():
    return gj.load(FOLDER, dtype="float32", layout="scan")


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.sampled_from([64, 512, 2048]))
@settings(max_examples=60, deadline=None)
def test_every_row_is_in_one_batch_that_it_fits(lengths, tokens):
    seen, shapes = [], set()
    for indices, count, width in batches(lengths, tokens):
        seen += indices.tolist()
        shapes.add((count, width))
        assert len(indices) <= count and count & (count - 1) == 0
        assert count == 1 or count * width <= tokens
        for i in indices:
            assert width == padded_length(lengths[i]) >= lengths[i]
            assert width <= 16 or (width - lengths[i]) * 3 < width
    assert sorted(seen) == list(range(len(lengths)))
    assert len(shapes) <= 2 * len({padded_length(n) for n in lengths}), "programs to compile"


def test_alone_and_together(loaded):
    model, tok = loaded
    texts = ["x", "two people at work", "a man is playing a guitar in the park " * 3, "which one"]
    together = gj.embed(model, tok, texts, task="query")
    assert together.shape == (4, 768) and together.dtype == np.float32
    for text, vector in zip(texts, together):
        (alone,) = gj.embed(model, tok, [text], task="query")
        np.testing.assert_allclose(vector, alone, atol=NOISE)
    np.testing.assert_allclose(
        gj.embed(model, tok, texts[::-1], task="query"), together[::-1], atol=NOISE
    )


def test_what_padding_holds_does_not_matter(loaded):
    model, tok = loaded
    ids = tok.encode("two people at work")
    rows, vectors = np.zeros((2, 2, 40), np.int32), []
    rows[1] = 300
    for tokens_BT in rows:
        tokens_BT[0, : len(ids)] = ids
        positions_BT = np.where(np.arange(40) < len(ids), np.arange(40), -1)
        positions_BT = np.stack([positions_BT, np.full(40, -1)])
        out = gj.forward(
            model, gj.Batch(tokens_BT, positions_BT), logits="none", capture=("final_norm",)
        )
        vectors.append(
            np.asarray(model.text_embedding(out.captured["final_norm"], positions_BT >= 0))
        )
    np.testing.assert_array_equal(*vectors)
    assert not vectors[0][1].any(), "a row without a token is none, and not NaN"


def test_int8_weights_and_other_models_with_a_mean(loaded):
    model, tok = loaded
    exact = gj.embed(model, tok, "two people at work")
    narrow = gj.load_model(FOLDER, weights="int8", layout="scan")
    cosine = float(np.sum(gj.embed(narrow, tok, "two people at work") * exact))
    assert 0.97 < cosine < 1


def test_progress_is_told(loaded):
    model, tok = loaded
    told = []
    gj.embed(model, tok, ["a", "b", "two " * 30], progress=lambda *step: told.append(step))
    assert told[-1] == (3, 3) and told == sorted(told)


REFUSED = [
    (lambda m, t: gj.embed(m, t, "x", task="querry"), "no prompt; .* did you mean 'query'"),
    (lambda m, t: gj.embed(m, t, "x", dimensions=769), r"whole number in \[1, 768\]"),
    (lambda m, t: gj.embed(m, t, "x", dimensions=0), r"whole number in \[1, 768\]"),
    (lambda m, t: gj.embed(m, t, "x", dimensions=1.5), r"whole number in \[1, 768\]"),
    (lambda m, t: gj.embed(m, t, [3]), "expected texts, got int"),
    (lambda m, t: gj.embed(m, t, "word " * 300), "reads at most 254"),
    (lambda m, t: embed_tokens(m, [[]]), "row 0 has 0 tokens"),
    (lambda m, t: embed_tokens(m, [[2, 340]]), r"row 0: ids must lie in \[0, 340\)"),
    (lambda m, t: gj.generate(m, t, "x"), "reads texts both ways, and writes none: .* gj.embed"),
    (lambda m, t: gj.score(m, [2, 5, 6]), "reads texts both ways, and writes none"),
    (lambda m, t: gj.loss(m, [[2, 5, 6]]), "has no next token to guess"),
    (
        lambda m, t: gj.forward(m, gj.Batch(np.ones((1, 4), int), documents_BT=np.zeros((1, 4)))),
        "packs no documents",
    ),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_what_such_a_model_does_not_do(loaded, call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call(*loaded)
    assert len(str(caught.value).splitlines()) == 1


def test_long_texts_are_cut_if_asked_for(loaded):
    model, tok = loaded
    text = "two people at work " * 100
    vector = gj.embed(model, tok, text, truncate=True)
    ids = [tok.bos_id, *tok.encode(text)[:254], tok.eos_id]
    np.testing.assert_allclose(vector, embed_tokens(model, [ids]), atol=NOISE)


def test_a_model_without_a_head_says_so():
    model, tok = gj.load("checkpoints/digits", modalities=("text",))
    with pytest.raises(ValueError, match="no pooling and no dense layers"):
        gj.embed(model, tok, "left")


def test_nothing_to_embed(loaded):
    assert gj.embed(*loaded, []).shape == (0, 768)


def test_gradients_reach_every_parameter(loaded):
    import jax

    model, _ = loaded
    tokens_BT = np.array([[2, 319, 321, 1]])

    def first_number(model):
        out = gj.forward(model, tokens_BT, logits="none", capture=("final_norm",))
        return model.text_embedding(out.captured["final_norm"], tokens_BT >= 0)[0, 0]

    gradient = jax.grad(first_number)(model)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(gradient))


def test_the_preset_embeds():
    cfg = gj.preset("tiny-embeddinggemma")
    model = gj.Gemma(cfg, rngs=nnx.Rngs(0))
    vectors = embed_tokens(model, [[2, 5, 6, 1], [2, 9, 1]])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
