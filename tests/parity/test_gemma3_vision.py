"""Numbers of transformers' multimodal Gemma 3, float32, on a tiny model that reads two images.

The window of its local layers (3) is narrower than an image (4 soft tokens), so that a mask which
is only nearly right shows. Tolerances as in `test_gemma3_text.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import nightly
from parity.goldens import DATA, assert_close, case, next_token_loss
from safetensors.numpy import load_file

from gemma_checkpoints import load_weights, save_hf
from gemma_jax import Prompt, Runtime, forward, generate
from gemma_jax.decoder.batch import Batch
from gemma_jax.decoder.soft_tokens import SoftTokens
from gemma_jax.multimodal.encode import encode_images
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.placeholders import locate, runs, soft_tokens

TEXT_CAPTURES = ("embeddings", "layer_outputs", "final_norm")
THEIRS = {
    "vision.layer_outputs": "vision_layer_outputs",
    "vision.tower": "vision_last_hidden_state",
    "vision.soft_tokens": "projector_output",
}


@pytest.fixture(scope="module", params=["unrolled", *nightly("scan")])
def model(request):
    return load_weights(DATA / "g3_mm", dtype="float32", layout=request.param)


def test_tower_and_projector(model):
    given, expected, tolerance = case("g3_mm", "forward")
    _, captured = encode_images(model, given["pixel_values"], capture=tuple(THEIRS))
    for ours, theirs in THEIRS.items():
        assert_close(captured[ours], expected[theirs], tolerance[theirs])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_logits_and_every_layer(implementation):
    runtime = Runtime(attention_impl=implementation)
    model = load_weights(DATA / "g3_mm", dtype="float32", runtime=runtime)
    given, expected, tolerance = case("g3_mm", "forward")
    ids = given["input_ids"].astype(np.int32)
    soft = soft_tokens(model, ids, given["pixel_values"])
    out = forward(model, Batch(ids, soft=soft), capture=TEXT_CAPTURES)
    assert_close(out.logits, expected["logits"], tolerance["logits"])
    for key in TEXT_CAPTURES:
        assert_close(out.captured[key], expected[key], tolerance[key])


def test_blocks_are_those_of_token_type_ids(model):
    given, _, _ = case("g3_mm", "forward")
    ids = given["input_ids"].astype(np.int32)
    _, block_BT = locate(ids, *modalities_of(model.cfg))
    np.testing.assert_array_equal(block_BT, runs(given["token_type_ids"] == 1))
    assert block_BT.max() == 2


@pytest.mark.parametrize(
    ("mistake", "change"),
    [
        ("causal inside images", 2.5),
        ("images swapped", 3.2),
        ("one bidirectional block for both images", 1.68),
    ],
)
def test_mistakes_show(model, mistake, change):
    """The stored sensitivity: by how much the logits change when one thing is wrong."""
    given, expected, _ = case("g3_mm", "forward")
    ids = given["input_ids"].astype(np.int32)
    soft = soft_tokens(model, ids, given["pixel_values"])
    fields = {"embeddings_ITD": soft.embeddings_ITD, "index_BT": soft.index_BT}
    if mistake == "images swapped":
        fields["embeddings_ITD"] = soft.embeddings_ITD[::-1]
    block_BT = soft.block_BT
    if mistake == "causal inside images":
        block_BT = None
    out = None
    if mistake == "one bidirectional block for both images":
        # Not an interval: image one would see image two and not the text between. The nearest that
        # can be said is one block over all of it.
        first, last = np.flatnonzero(np.asarray(block_BT[0]))[[0, -1]]
        block_BT = jnp.zeros_like(block_BT).at[0, first : last + 1].set(1)
    out = forward(model, Batch(ids, soft=SoftTokens(**fields, block_BT=block_BT)))
    error = np.abs(np.asarray(out.logits) - expected["logits"]).max()
    assert error > 0.4 * change


def test_greedy_continuation(model):
    given, expected, tolerance = case("g3_mm", "generate")
    prompt = Prompt(given["input_ids"][0].tolist(), given["pixel_values"])
    done = generate(model, None, prompt, max_new_tokens=expected["gen_ids"].shape[1])
    assert done.token_ids == expected["gen_ids"][0].tolist()
    log_probs = jax.nn.log_softmax(expected["gen_logits"][0], axis=-1)
    chosen = np.take_along_axis(log_probs, expected["gen_ids"][0][:, None], axis=-1)[:, 0]
    assert_close(done.log_probs, chosen, 2 * tolerance["gen_logits"])


def test_gradients(model, tmp_path):
    given, expected, tolerance = case("g3_mm", "gradients")
    ids, labels = given["input_ids"].astype(np.int32), given["labels"]

    def loss(model):
        soft = soft_tokens(model, ids, given["pixel_values"])
        return next_token_loss(forward(model, Batch(ids, soft=soft)).logits, labels)

    value, grads = jax.jit(jax.value_and_grad(loss))(model)
    assert_close(value, expected["loss"], tolerance["loss"])
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    assert_close(norm, expected["grad_global_norm"], tolerance["grad_global_norm"])

    save_hf(grads, tmp_path / "grads")
    ours = load_file(tmp_path / "grads" / "model.safetensors")
    theirs = {k: v for k, v in expected.items() if k.startswith("grad.")}
    assert len(theirs) >= 6
    for name, value in theirs.items():
        assert_close(ours[published(name)], value, tolerance[name])


def published(name: str) -> str:
    """The name in a published file of what transformers calls `name` in memory."""
    name = name.removeprefix("grad.model.")
    name = name.replace("vision_tower.", "vision_tower.vision_model.")
    return name.replace("language_model.", "language_model.model.")


def test_float32_tower_in_a_bfloat16_model():
    """The tower runs in the model's dtype, or in float32 on request."""
    given, expected, tolerance = case("g3_mm", "forward")
    errors = []
    for vision_dtype in (None, jnp.dtype("float32")):
        runtime = Runtime(dtype=jnp.dtype("bfloat16"), vision_dtype=vision_dtype)
        model = load_weights(DATA / "g3_mm", dtype="float32", runtime=runtime)
        soft, _ = encode_images(model, given["pixel_values"])
        assert soft.dtype == (vision_dtype or jnp.bfloat16)
        errors.append(np.abs(np.asarray(soft, np.float32) - expected["projector_output"]).max())
    assert errors[1] <= tolerance["projector_output"] < errors[0]
