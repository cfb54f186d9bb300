"""The stored numbers of `data/`, with the tolerance of each output."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from parity_rows import Tolerance, seen
from safetensors.numpy import load_file

from gemma_checkpoints import save_hf
from gemma_jax import forward, generate

DATA = Path(__file__).parent / "data"


def case(folder: str, name: str):
    """`(inputs, outputs, tolerances)` of a stored case."""
    arrays = load_file(DATA / folder / f"{name}.safetensors")
    facts = json.loads((DATA / folder / f"{name}.json").read_text())["outputs"]
    noise = {k: max(f.get("noise_fp64", 0), f.get("noise_alt", 0)) for k, f in facts.items()}
    tolerances = {k: 10 * value for k, value in noise.items()}
    # The gather and the one product of the embedding have no noise of their own to speak of.
    tolerances = {
        k: Tolerance(value or 5e-6, k, folder, noise[k]) for k, value in tolerances.items()
    }
    split = {
        p: {k[len(p) :]: v for k, v in arrays.items() if k.startswith(p)} for p in ("in.", "out.")
    }
    return split["in."], split["out."], tolerances


def assert_close(actual, expected, tolerance, where=True, of=""):
    error = np.abs(np.asarray(actual) - expected) * where
    seen(error, tolerance, of)
    assert error.max() <= tolerance


def assert_continues(model, folder: str, name: str):
    """Holds what a model writes greedily, and how probable it finds it, against a stored case."""
    given, expected, tolerance = case(folder, name)
    mask = given.get("attention_mask", np.ones_like(given["input_ids"])) == 1
    rows = [ids[keep].tolist() for ids, keep in zip(given["input_ids"], mask)]
    done = generate(model, None, rows, max_new_tokens=expected["gen_ids"].shape[1])
    assert [row.token_ids for row in done] == expected["gen_ids"].tolist()
    log_probs = jax.nn.log_softmax(expected["gen_logits"], axis=-1)
    chosen = np.take_along_axis(log_probs, expected["gen_ids"][..., None], axis=-1)[..., 0]
    # A log-probability differs by at most twice what the logits do.
    assert_close([row.log_probs for row in done], chosen, 2 * tolerance["gen_logits"])


def next_token_loss(logits_BTV, labels_BT):
    """Mean over the positions `t` with `labels[t + 1] != -100`, as transformers counts."""
    log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    targets_BT = jnp.asarray(labels_BT[:, 1:])
    real_BT = targets_BT != -100
    chosen = jnp.take_along_axis(log_probs_BTV, jnp.maximum(targets_BT, 0)[..., None], -1)
    return -jnp.sum(chosen[..., 0] * real_BT) / real_BT.sum()


def loss_gradient(model, folder: str):
    """Loss and its gradient on the stored batch of `folder`."""
    given, _, _ = case(folder, "gradients")
    ids, labels = given["input_ids"].astype(np.int32), given["labels"]
    return jax.jit(jax.value_and_grad(lambda m: next_token_loss(forward(m, ids).logits, labels)))(
        model
    )


def assert_gradient(grads, folder: str, target: Path, least: int):
    """Every stored tensor of the gradient, of which there are `least`; it is written to `target`.

    A gradient is shaped like a model, so it exports like one.
    """
    _, expected, tolerance = case(folder, "gradients")
    save_hf(grads, target)
    ours = load_file(target / "model.safetensors")
    theirs = {k: v for k, v in expected.items() if k.startswith("grad.")}
    assert len(theirs) >= least
    for name, value in theirs.items():
        assert_close(ours[name.removeprefix("grad.")], value, tolerance[name])
