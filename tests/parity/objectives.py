"""Numbers of objectives of training: cases with two models, and a tolerance for each output.

`data/dpo` and `data/distill` hold what trl 1.16 and torch compute from the student or policy
`data/g3_text` in float32. The reference of `dpo` is stored as its difference from the policy, bit
patterns subtracted, which packs better.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from parity.goldens import DATA
from parity_rows import seen
from safetensors.numpy import load_file, save_file

from gemma_checkpoints import load_weights, save_hf
from gemma_jax.decoder.batch import Batch
from gemma_jax.training.objectives import TrainBatch


def objective_case(name: str):
    """`(inputs, outputs, {output: (atol, rms_atol)})` of `dpo` or `distill`."""
    arrays = load_file(DATA / name / f"{name}.safetensors")
    given, out = (
        {k.removeprefix(p): v for k, v in arrays.items() if k.startswith(p)}
        for p in ("in.", "out.")
    )
    tolerances = json.loads((DATA / name / f"{name}.json").read_text())["atol, rms_atol"]
    assert tolerances.keys() == out.keys()
    return given, out, tolerances


def stored_rows(given, counts_BT) -> TrainBatch:
    """The rows of a case, and how much each of their tokens counts."""
    real_BT = given["attention_mask"] == 1
    positions_BT = np.where(real_BT, np.cumsum(real_BT, axis=1) - 1, -1).astype(np.int32)
    batch = Batch(given["input_ids"].astype(np.int32), positions_BT)
    return TrainBatch(batch, weights_BT=counts_BT.astype(np.float32))


def load_reference(folder: Path):
    """The reference of `dpo`."""
    policy, delta = DATA / "g3_text", np.load(DATA / "dpo" / "reference_minus_g3_text.npz")
    weights = load_file(policy / "model.safetensors")
    moved = {k: (v.view(np.uint16) + delta[k]).view(v.dtype) for k, v in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(policy / "config.json", folder)
    return load_weights(folder, dtype="float32")


def assert_within(actual, expected, tolerance, name: str):
    """By the largest error and by its root mean square."""
    atol, rms_atol = tolerance
    error = np.asarray(actual).reshape(expected.shape).astype(np.float64) - expected
    rms = np.sqrt(np.mean(np.square(error)))
    seen(error, atol, name)
    seen(rms, rms_atol, f"{name}, root mean square")
    assert np.abs(error).max() <= atol, name
    assert rms <= rms_atol, name


def assert_objective(tag: str, case, loss, gradients, each, folder: Path):
    """Loss, norm of the gradient, stored gradients, and the loss of each pair or token."""
    _, expected, tolerances = case
    save_hf(gradients, folder)
    ours = {f"{tag}.grad.{k}": v for k, v in load_file(folder / "model.safetensors").items()}
    squares = sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients))
    ours |= {f"{tag}.loss": loss, f"{tag}.grad_norm": jnp.sqrt(squares)}
    ours |= {f"{tag}.per_pair": each, f"{tag}.per_token": each}
    wanted = [name for name in expected if name.startswith(tag + ".")]
    assert len(wanted) >= 4
    for name in wanted:
        assert_within(ours[name], expected[name], tolerances[name], name)
