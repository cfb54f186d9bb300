"""Numbers of sentence-transformers' EmbeddingGemma, on a tiny model whose every part matters.

`data/embedding` holds texts, ids and vectors of sentence-transformers 6.2 over transformers 5.24,
float32. Tolerances are ten times the rounding noise measured when they were made: the distance to a
float64 run.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from parity.goldens import DATA, assert_close
from parity_rows import Tolerance
from safetensors.numpy import load_file

import gemma_jax as gj
from gemma_jax.text_embedding.embed import embed_tokens

FOLDER = DATA / "embedding" / "tiny"
FACTS = json.loads((DATA / "embedding" / "embeddings.json").read_text())
ARRAYS = load_file(DATA / "embedding" / "embeddings.safetensors")
TEXTS = FACTS["texts"]
TOLERANCE = {
    name: Tolerance(atol, name, noise=FACTS["noise_fp64"][name])
    for name, atol in FACTS["suggested_atol"].items()
}


def stored(name: str) -> np.ndarray:
    """Vectors of all texts, one per row."""
    return np.stack([ARRAYS[f"out.{name.format(i)}"] for i in range(len(TEXTS))])


def rows() -> list[list[int]]:
    return [ARRAYS[f"in.ids_{i}"].tolist() for i in range(len(TEXTS))]


def error(actual, expected) -> float:
    return float(np.abs(np.asarray(actual) - expected).max())


@pytest.fixture(scope="module", params=["unrolled", "scan"])
def loaded(request):
    return gj.load(FOLDER, dtype="float32", layout=request.param)


@pytest.fixture(scope="module")
def model():
    return gj.load_model(FOLDER, dtype="float32", layout="scan")


def test_ids_vectors_and_prompts(loaded):
    model, tok = loaded
    for i, text in enumerate(TEXTS):
        vector = gj.embed(model, tok, text["text"], task=text["prompt_name"])
        assert_close(vector[0], ARRAYS[f"out.embedding_{i}"], TOLERANCE["embedding"])


def test_all_texts_in_one_batch(loaded):
    vectors = embed_tokens(loaded[0], rows(), batch_tokens=10_000)
    assert_close(vectors, stored("embedding_{}"), TOLERANCE["embedding"])


@pytest.mark.parametrize("dimensions", [768, 512, 256, 128])
def test_first_numbers_get_a_norm_of_their_own(model, dimensions):
    name = "embedding_{}" if dimensions == 768 else f"embedding_{{}}_{dimensions}"
    vectors = embed_tokens(model, rows(), dimensions=dimensions)
    assert_close(vectors, stored(name), TOLERANCE["embedding"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_way_to_a_vector_and_padding_on_either_side(implementation, side):
    model = gj.load_model(FOLDER, dtype="float32", layout="scan", attention_impl=implementation)
    longest = max(map(len, rows())) + 5
    tokens_BT = np.full((len(TEXTS), longest), 7, np.int32)
    positions_BT = np.full_like(tokens_BT, -1)
    for b, ids in enumerate(rows()):
        place = slice(longest - len(ids), None) if side == "left" else slice(len(ids))
        tokens_BT[b, place], positions_BT[b, place] = ids, np.arange(len(ids))
    out = gj.forward(model, gj.Batch(tokens_BT, positions_BT), capture=("final_norm",))
    pooled_BD = model.text_embedding.pool(out.captured["final_norm"], positions_BT >= 0)
    assert_close(pooled_BD, stored("pooled_{}"), TOLERANCE["pooled"])
    dense = model.text_embedding.project(pooled_BD)
    assert_close(dense, stored("dense_{}"), TOLERANCE["dense"])


MISTAKES = {
    "causal": lambda cfg: replace(with_window(cfg, 6), bidirectional=False),
    "half window - 1": lambda cfg: with_window(cfg, 3),
    "half window + 1": lambda cfg: with_window(cfg, 5),
    "full window both ways": lambda cfg: with_window(cfg, 6),
}


def with_window(cfg: gj.GemmaConfig, window: int) -> gj.GemmaConfig:
    return replace(cfg, layers=tuple(replace(s, window=s.window and window) for s in cfg.layers))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_show(mistake):
    """Each as far off as when the numbers were made: none hides in the tolerance."""
    model = gj.load_model(FOLDER, dtype="float32", layout="scan", config=MISTAKES[mistake])
    off = error(embed_tokens(model, rows()), stored("embedding_{}"))
    assert off == pytest.approx(FACTS["sensitivity_max_abs_change"][mistake], rel=1e-3)


@pytest.mark.parametrize("mistake, kept", [("no eos", slice(-1)), ("no bos", slice(1, None))])
def test_both_ends_count(model, mistake, kept):
    off = error(embed_tokens(model, [ids[kept] for ids in rows()]), stored("embedding_{}"))
    assert off > 0.01
    if (seen := FACTS["sensitivity_max_abs_change"].get(mistake)) is not None:
        assert off == pytest.approx(seen, rel=1e-3)


@pytest.mark.parametrize("layout", ["unrolled", "scan"])
def test_bfloat16_is_near(layout):
    """Nearer than the least of the mistakes by far: eight bits of every activation."""
    model = gj.load_model(FOLDER, dtype="bfloat16", layout=layout)
    vectors = embed_tokens(model, rows())
    assert vectors.dtype == np.float32
    assert error(vectors, stored("embedding_{}")) < 0.01
    cosines = np.sum(vectors * stored("embedding_{}"), axis=1)
    assert cosines.min() > 0.995
