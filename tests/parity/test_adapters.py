"""Adapters as PEFT 0.21 has them: logits, gradients, merged weights, and two steps of AdamW.

`data/adapters` holds folders that PEFT wrote and what it computed with them, on the tiny models
beside it, in float32. Tolerances come from the rounding noise that was measured when they were
made: of the largest error, and of its root mean square over a tensor, as AdamW divides by gradients
that may be near 0.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import nightly
from parity.goldens import DATA
from parity_rows import seen
from safetensors.numpy import load_file

from gemma_checkpoints import load_adapter, load_weights, save_hf
from gemma_checkpoints.hf.adapters import read_adapter
from gemma_checkpoints.hf.adapters_out import trained_by_key
from gemma_checkpoints.hf.names import short_name
from gemma_jax import forward, make_step, merge, next_token
from gemma_jax.decoder.batch import Batch
from gemma_jax.multimodal.encode import encode_images
from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.placeholders import place
from gemma_jax.training.lora import train_adapters
from gemma_jax.training.objectives import TrainBatch

FOLDER = DATA / "adapters"
SHORT = ["g3_text_embedding", "g3n_text_patterns_some_layers", "g3_text_embedding_tied"]
SEEING = ["g3_mm_dora_with_projector", "g3_mm_plain_by_name"]


class Case:
    """A stored adapter, its base, and what PEFT computed."""

    def __init__(self, name):
        self.folder = FOLDER / name
        facts = json.loads((self.folder / "case.json").read_text())
        self.optimiser, self.tolerances = facts["optimiser"], facts["tolerances"]
        self.base = load_weights(DATA / facts["base"], dtype="float32", layout="unrolled")
        arrays = load_file(self.folder / "case.safetensors")
        split = {p: {k[len(p) :]: v for k, v in arrays.items() if k.startswith(p)}
                 for p in ("in.", "out.")}  # fmt: skip
        self.given, self.expected = split["in."], split["out."]
        self.real_BT = self.given["attention_mask"] == 1

    def batch(self, model):
        ids = self.given["input_ids"].astype(np.int32)
        positions = np.where(self.real_BT, np.cumsum(self.real_BT, axis=1) - 1, -1)
        soft = None
        if model.vision is not None:
            pixels = load_file(FOLDER / "pixels.safetensors")["pixel_values"]
            image = {one.name: one for one in modalities_of(model.cfg)}["image"]
            soft = place(ids, [image], [encode_images(model, pixels)[0]])
        return Batch(ids, positions.astype(np.int32), soft=soft)

    def objective(self, model, _, key):
        labels = self.given["labels"].astype(np.int32)
        targets = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
        return next_token(model, TrainBatch(self.batch(model), jnp.maximum(targets, -1)), key)

    def assert_close(self, name, ours, where=True):
        expected, tolerance = self.expected[name], self.tolerances[name]
        error = np.abs(np.asarray(ours) - expected) * where
        seen(error, tolerance["atol"], name)
        assert error.max() <= tolerance["atol"], name
        assert np.sqrt(np.mean(error**2)) <= tolerance.get("rms_atol", np.inf), name


@pytest.fixture(scope="module", params=[*SHORT[:1], *nightly(*SHORT[1:], *SEEING)])
def case(request):
    return Case(request.param)


def keeping_gradients():
    """An optimizer that changes nothing, and whose state is the last gradients."""
    return optax.GradientTransformation(lambda p: p, lambda g, s, p=None: (g, g))


def trainable(case):
    model = load_adapter(case.base, case.folder)
    return train_adapters(model, read_adapter(case.base, case.folder).whole.keys())


def test_logits(case):
    model = load_adapter(case.base, case.folder)
    logits = forward(model, case.batch(model)).logits
    case.assert_close("logits", logits, case.real_BT[..., None])


def test_steps(case):
    """Loss, gradients of all that is trained, and both steps, of which each sees the last one."""
    trained, frozen, join = trainable(case)
    model, facts = join(trained, frozen), case.optimiser
    rates = jnp.array(facts["lrs"])
    optimizer = optax.chain(
        keeping_gradients(),
        optax.clip_by_global_norm(facts["clip"]),
        optax.adamw(
            lambda i: rates[i], *facts["betas"], facts["eps"], weight_decay=facts["weight_decay"]
        ),
    )
    init, step = make_step(case.objective, optimizer, join)
    state, step = init(trained, jax.random.key(0)), jax.jit(step)
    losses, norms = [], []
    for i in range(2):
        state, metrics = step(state, frozen, None)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
        if i == 0:
            gradients = trained_by_key(model, state.moments[0])
    case.assert_close("loss", losses[:1])
    case.assert_close("grad_norm", norms[:1])
    stored = [name for name in case.expected if name.startswith("grad.")]
    assert len(stored) >= 6
    for name in stored:
        case.assert_close(name, gradients[name.removeprefix("grad.")])
    if "step_loss" not in case.expected:
        return
    case.assert_close("step_loss", losses)
    case.assert_close("step_grad_norm", norms)
    after = trained_by_key(model, state.trained)
    for name in [name for name in case.expected if name.startswith("param.")]:
        case.assert_close(name, after[name.removeprefix("param.")])


def test_merged(case, tmp_path):
    """The weights are PEFT's. So are the logits of the adapted model, which PEFT's own merge does
    not keep where an embedding is adapted."""
    merged = merge(load_adapter(case.base, case.folder))
    save_hf(merged, tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    short = {short_name(name): array for name, array in tensors.items()}
    stored = [name for name in case.expected if name.startswith("merged.")]
    assert stored
    for name in stored:
        case.assert_close(name, short[short_name(name.removeprefix("merged."))])
    logits = forward(merged, case.batch(merged)).logits
    case.assert_close("logits", logits, case.real_BT[..., None])
    again = load_weights(tmp_path / "merged", dtype="float32", layout="unrolled")
    assert again.cfg.tied_head == merged.cfg.tied_head
