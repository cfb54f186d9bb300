"""Several texts in one row: each is what it is alone."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_jax import Batch, forward, init_cache, loss

LENGTHS = (8, 1, 8)
DOCUMENTS = np.repeat(np.arange(len(LENGTHS), dtype=np.int32), LENGTHS)[None]


@pytest.fixture(scope="module", params=["gemma2", "gemma3n"])
def model(request):
    return tiny.model(getattr(tiny, request.param)())


@pytest.fixture(scope="module")
def texts(model):
    ids = tiny.tokens(model.cfg, 1, sum(LENGTHS))
    return np.split(ids, np.cumsum(LENGTHS)[:-1], axis=1)


def test_packed_texts_are_what_they_are_alone(model, texts):
    packed = Batch(np.concatenate(texts, axis=1), documents_BT=DOCUMENTS)
    alone = np.concatenate([forward(model, text).logits for text in texts], axis=1)
    np.testing.assert_allclose(forward(model, packed).logits, alone, atol=1e-5)
    unpacked = forward(model, packed.tokens_BT).logits
    assert np.abs(unpacked[:, LENGTHS[0] :] - alone[:, LENGTHS[0] :]).max() > 1e-2


def test_no_token_is_asked_for_that_begins_another_text(model, texts):
    packed = Batch(np.concatenate(texts, axis=1), documents_BT=DOCUMENTS)
    alone = [loss(model, text) * (text.shape[1] - 1) for text in texts if text.shape[1] > 1]
    expected = sum(alone) / (sum(LENGTHS) - len(LENGTHS))
    np.testing.assert_allclose(loss(model, packed), expected, rtol=1e-5)


def test_packed_texts_have_no_cache(model, texts):
    cache = init_cache(model.cfg, model.layer_groups, 1, 64, jnp.float32)
    with pytest.raises(ValueError, match="documents_BT .* without a cache"):
        forward(model, Batch(np.concatenate(texts, axis=1), documents_BT=DOCUMENTS), cache=cache)
