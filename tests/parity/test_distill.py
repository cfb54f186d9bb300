"""Divergences from a teacher against torch, those over all tokens also against trl."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.goldens import DATA
from parity.objectives import assert_objective, assert_within, objective_case, stored_rows

from gemma_checkpoints import load_weights
from gemma_jax.training import divergence
from gemma_jax.training.distillation import DistillBatch, distill
from gemma_jax.training.divergence import Divergence, Hidden, token_divergences
from gemma_jax.training.model_pair import ModelPair

CASE = objective_case("distill")
TAGS = sorted({name.removesuffix(".loss") for name in CASE[1] if name.endswith(".loss")})
TAG = "forward_kl_T2"


def options(tag: str) -> dict:
    """Of `topk_renormalised_student_T2`, say."""
    name, temperature = re.fullmatch(r"(\w+)_T(\d)", tag).groups()
    if form := re.fullmatch(r"topk_(\w+)_student", name):
        return {"top_k": 8, "form": form[1], "temperature": float(temperature)}
    return {"kind": name, "temperature": float(temperature)}


@pytest.fixture(scope="module")
def student():
    return load_weights(DATA / "g3_text", dtype="float32")


@pytest.fixture(scope="module")
def teacher():
    return load_weights(DATA / "distill" / "teacher", dtype="float32")


@pytest.fixture(scope="module")
def rows():
    given, _, _ = CASE
    return stored_rows(given, (given["labels"] != -100))


@pytest.fixture(scope="module")
def hidden(student, teacher, rows):
    """What both models make of the batch, and what takes the gradients of the student's activations
    and table back to its parameters: compiled once for all divergences."""

    @jax.jit
    def back(student, dx_BTD, dtable_VD):
        def made(student):
            hidden = Hidden.of(student, rows.batch)
            return hidden.x_BTD, hidden.table

        return jax.vjp(made, student)[1]((dx_BTD, dtable_VD))[0]

    of_both = (jax.jit(lambda model: Hidden.of(model, rows.batch))(m) for m in (student, teacher))
    return *of_both, partial(back, student)


@pytest.mark.parametrize("tag", TAGS)
def test_losses_and_gradients(tag, hidden, tmp_path):
    given, _, _ = CASE
    ours, theirs, back = hidden
    counts_BT = np.pad(given["labels"][:, 1:] != -100, ((0, 0), (0, 1)))

    @jax.jit
    def run(ours):
        def loss(ours):
            rule = Divergence(**options(tag))
            each_BT = token_divergences(ours, theirs, rule, block=8) * counts_BT
            return each_BT.sum() / counts_BT.sum(), each_BT

        return jax.value_and_grad(loss, has_aux=True)(ours)

    (value, each_BT), gradients = run(ours)
    gradients = back(gradients.x_BTD, gradients.table)
    assert_objective(tag, CASE, value, gradients, each_BT[:, :-1], tmp_path)


def test_the_objective_as_a_whole(student, teacher, rows, tmp_path):
    def loss(student):
        return distill(ModelPair(student, teacher), rows, **options(TAG))

    (value, metrics), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    assert metrics["tokens"] == (CASE[0]["labels"][:, 1:] != -100).sum()
    _, expected, _ = CASE
    each = expected[f"{TAG}.per_token"]  # seen in the test above
    assert_objective(TAG, CASE, value, gradients, each, tmp_path)


def test_logits_of_the_teacher(hidden, rows):
    _, expected, tolerances = CASE
    _, theirs, _ = hidden
    real_BT1 = rows.batch.positions_BT[:, :-1, None] >= 0
    logits_BTV = divergence._logits(theirs.x_BTD, theirs.table)[:, :-1] * real_BT1
    name = "teacher_logits"
    assert_within(logits_BTV, expected[name], tolerances[name], name)


@pytest.mark.parametrize("tag", ["topk_full_student_T1", "topk_renormalised_student_T2"])
def test_a_stored_top_is_as_good_as_the_teacher(tag, student, rows):
    _, expected, tolerances = CASE
    logits_BTV = np.pad(expected["teacher_logits"], ((0, 0), (0, 1), (0, 0)))
    logps, ids = jax.lax.top_k(jax.nn.log_softmax(jnp.asarray(logits_BTV)), 8)
    value, _ = distill(student, DistillBatch(rows, ids, logps), **options(tag))
    assert_within(value, expected[f"{tag}.loss"], tolerances[f"{tag}.loss"], tag)
