"""Numbers of transformers' Gemmas for several texts in one row, float32: loss and gradients.

Windows are narrower than the texts, so that one that looks into the text before shows; in `g3_mm`
each text has an image, whose soft tokens see each other both ways. Tolerances as in
`test_gemma3_text.py`; those of the loss of a row are of the losses of its tokens.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import nightly
from parity.goldens import DATA, assert_close, case
from safetensors.numpy import load_file

from gemma_checkpoints import load_weights, save_hf
from gemma_jax import forward, token_losses
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.losses import loss_and_weight
from gemma_jax.multimodal.placeholders import soft_tokens

FOLDERS = ("g3_text scan", "g3n_text scan", "g3_mm scan")
UNROLLED = nightly("g3_text unrolled", "g3n_text unrolled", "g3_mm unrolled")


@pytest.fixture(scope="module", params=[*FOLDERS, *UNROLLED])
def stored(request):
    folder, layout = request.param.split()
    model = load_weights(DATA / folder, dtype="float32", layout=layout)
    return model, *case(folder, "packed")


def packed(given) -> Batch:
    """The stored row as ours: padding without a position, in the last text's number or beyond."""
    documents = given["segment_ids"].astype(np.int32)
    real = documents > 0
    along = np.arange(documents.shape[1], dtype=np.int32)[None]
    return Batch(
        given["input_ids"].astype(np.int32),
        np.where(real, along, -1),
        documents_BT=np.where(real, documents, documents.max() + 1),
    )


def labels(given):
    return np.where(given["labels"] < 0, -1, given["labels"]).astype(np.int32)


def targets(given):
    return np.pad(labels(given)[:, 1:], ((0, 0), (0, 1)), constant_values=-1)


def with_soft(model, batch, pixels):
    return replace(
        batch, soft=None if pixels is None else soft_tokens(model, batch.tokens_BT, pixels)
    )


def test_losses_of_packed_tokens_are_those_of_the_texts_alone(stored):
    model, given, expected, tolerance = stored
    batch = with_soft(model, packed(given), given.get("pixel_values"))
    out = forward(model, batch, logits="none", capture=("final_norm",))
    ours = token_losses(model, out.captured["final_norm"], targets(given))[:, :-1]
    assert_close(ours, expected["packed_token_losses"], tolerance["packed_token_losses"])
    ends = np.cumsum([expected[k].shape[1] + 1 for k in sorted(expected) if "losses_" in k])
    for i, end in enumerate(ends):
        name = f"separate_token_losses_{i}"
        alone = ours[:, end - expected[name].shape[1] - 1 : end - 1]
        assert_close(alone, expected[name], tolerance["packed_token_losses"])


@pytest.mark.parametrize(
    "stored", [FOLDERS[0], FOLDERS[2], *nightly(FOLDERS[1]), *UNROLLED], indirect=True
)
def test_loss_and_gradients_of_a_packed_row(stored, tmp_path):
    model, given, expected, tolerance = stored
    batch, weights = packed(given), (labels(given) >= 0).astype(np.float32)

    def loss(model):
        read = with_soft(model, batch, given.get("pixel_values"))
        return loss_and_weight(model, read, weights_BT=weights)

    (value, tokens), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(model)
    assert tokens == weights.sum()
    per_token = tolerance["packed_token_losses"]
    assert_close(value, expected["packed_loss"][0], per_token)
    assert_close(value, expected["separate_loss"][0], per_token)
    norm = optax.tree.norm(jax.tree.map(jnp.asarray, gradients))
    assert_close(norm, expected["grad_norm"][0], tolerance["grad_norm"])
    save_hf(gradients, tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = {k: v for k, v in expected.items() if k.startswith("grad.")}
    assert len(theirs) >= 5
    for name, value in theirs.items():
        assert_close(ours[published(name)], value, tolerance[name])


def published(name: str) -> str:
    """What files call a parameter; those of text models do as transformers does."""
    name = name.removeprefix("grad.")
    if not name.startswith(("model.language_model.", "model.vision", "model.multi")):
        return name
    tower = name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")
    return tower.replace("language_model.", "language_model.model.")
