"""A Gemma 3n that sees and hears against transformers: text, images and sounds in one prompt."""

import jax
import numpy as np
import pytest
from marks import nightly
from parity.goldens import DATA, assert_close, case
from safetensors.numpy import load_file

from gemma_checkpoints import load_weights
from gemma_jax import Prompt, forward, generate
from gemma_jax.decoder.batch import Batch
from gemma_jax.multimodal.encode import Clips, encode_audio, encode_images
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.placeholders import place

FOLDER = "g3n_mm"


@pytest.fixture(scope="module", params=["scan", *nightly("unrolled")])
def model(request):
    return load_weights(DATA / FOLDER, dtype="float32", layout=request.param)


@pytest.fixture(scope="module")
def soft(model):
    """Of the stored batch, and what was captured on the way."""
    given, _, _ = case(FOLDER, "forward")
    lengths_I = given["input_features_mask"].sum(axis=1).astype(np.int32)
    images, seen = encode_images(
        model, given["pixel_values"], capture=("vision.tower", "vision.soft_tokens")
    )
    clips, heard = encode_audio(
        model, Clips(given["input_features"], lengths_I), capture=("audio.soft_tokens",)
    )
    tokens = given["input_ids"].astype(np.int32)
    return place(tokens, modalities_of(model.cfg), [images, clips]), seen | heard


def test_soft_tokens_of_both_towers(soft):
    _, expected, tolerance = case(FOLDER, "forward")
    _, captured = soft
    theirs = {
        "vision.tower": "vision_last_hidden_state",
        "vision.soft_tokens": "image_features",
        "audio.soft_tokens": "audio_features",
    }
    for ours, name in theirs.items():
        assert_close(captured[ours], expected[name], tolerance[name])


def test_embeddings_and_logits_of_ragged_rows(model, soft):
    given, expected, tolerance = case(FOLDER, "forward")
    tokens, mask = given["input_ids"].astype(np.int32), given["attention_mask"]
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, -1).astype(np.int32)
    names = ("embeddings", "inputs_embeds", "final_norm")
    out = forward(model, Batch(tokens, positions, soft=soft[0]), capture=names)
    real = mask[:, :, None]
    for name, value in {"logits": out.logits, **out.captured}.items():
        assert_close(value, expected[name], tolerance[name], real)
    rows = model.per_layer.lookup(tokens, "float32")
    assert_close(rows, expected["per_layer_token_inputs"], tolerance["per_layer_token_inputs"])


def test_ids_of_images_and_sounds_without_their_items(model):
    """Ids of the vocabularies of images and sounds have embeddings of their own."""
    given, expected, tolerance = case(FOLDER, "forward_text_only")
    ids = given["input_ids"].astype(np.int32)
    out = forward(model, ids, capture=("layer_outputs", "final_norm"))
    for name, value in {"logits": out.logits, **out.captured}.items():
        assert_close(value, expected[name], tolerance[name])


@pytest.mark.nightly
def test_greedy_continuation(model):
    """Row by row with a cache, as prompts."""
    arrays = load_file(DATA / FOLDER / "generate.safetensors")
    given = {name[3:]: array for name, array in arrays.items() if name.startswith("in.")}
    features, pixels = given["input_features"], given["pixel_values"]
    image, audio = modalities_of(model.cfg)
    prompts, images, clips = [], iter(pixels), iter(zip(features, given["input_features_mask"]))
    for ids, mask in zip(given["input_ids"], given["attention_mask"]):
        row = ids[mask == 1]
        count = {
            one.name: int((row == one.placeholder).sum()) // one.tokens_per_item
            for one in (image, audio)
        }
        media = {
            "image": [next(images) for _ in range(count["image"])],
            "audio": [f[m == 1] for f, m in (next(clips) for _ in range(count["audio"]))],
        }
        prompts.append(Prompt(row.tolist(), media=media))
    expected = arrays["out.gen_ids"]
    done = generate(model, None, prompts, max_new_tokens=expected.shape[1])
    assert [one.token_ids for one in done] == expected.tolist()


def test_a_clip_is_filled_up_with_the_last_id_for_sounds(model):
    """Places without sound are embedded as that id is in the text."""
    given, _, _ = case(FOLDER, "forward")
    cfg = model.cfg.audio
    features = given["input_features"][:1, :40]
    filled, _ = encode_audio(model, features)
    bare, _ = encode_audio(model, features, pad=False)
    assert filled.shape[1] == cfg.num_soft_tokens and bare.shape[1] == 3
    np.testing.assert_allclose(filled[:, :3], bare, atol=1e-6)
    vocabulary = model.cfg.modality_vocabularies[1]
    last = np.array([[vocabulary.first_id + vocabulary.vocab_size - 1]], np.int32)
    hard = forward(model, last, capture="inputs_embeds").captured["inputs_embeds"]
    np.testing.assert_allclose(filled[0, 3:], np.repeat(hard[0], 6, axis=0), atol=1e-6)


@pytest.mark.nightly
def test_gradients_reach_both_towers(model):
    given, _, _ = case(FOLDER, "forward")
    tokens = given["input_ids"].astype(np.int32)

    def loss(model):
        images, _ = encode_images(model, given["pixel_values"])
        clips, _ = encode_audio(model, given["input_features"])
        soft = place(tokens, modalities_of(model.cfg), [images, clips])
        return forward(model, Batch(tokens, soft=soft), logits="last").logits.std()

    gradients = jax.jit(jax.grad(loss))(model)
    for tower in (gradients.vision, gradients.audio):
        sizes = [float(np.abs(np.asarray(leaf)).max()) for leaf in jax.tree.leaves(tower)]
        assert np.isfinite(sizes).all() and np.mean(np.array(sizes) > 0) > 0.95
