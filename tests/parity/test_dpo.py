"""Preference losses against trl, and against their definitions where trl has none."""

from functools import partial

import jax
import numpy as np
import pytest
from parity.goldens import DATA
from parity.objectives import (
    assert_objective,
    assert_within,
    load_reference,
    objective_case,
    stored_rows,
)

from gemma_checkpoints import load_weights
from gemma_jax.training.model_pair import ModelPair
from gemma_jax.training.preference import (
    PreferenceBatch,
    compare,
    completion_logps,
    dpo,
    preferences,
)

CASE = objective_case("dpo")
TAG = "sigmoid_beta0.1"  # of which most gradients are stored
KINDS = {"sigmoid_smoothed": "smoothed"}
TAGS = sorted({name.removesuffix(".loss") for name in CASE[1] if name.endswith(".loss")})


def options(tag: str) -> dict:
    """Of `sigmoid_smoothed_beta0.1_eps0.1`, say."""
    name, _, numbers = tag.partition("_beta")
    beta, _, eps = numbers.partition("_eps")
    return {
        "kind": KINDS.get(name, name),
        "beta": float(beta),
        "label_smoothing": float(eps or 0),
    }


@pytest.fixture(scope="module")
def policy():
    return load_weights(DATA / "g3_text", dtype="float32")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return load_reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def rows():
    given, _, _ = CASE
    return stored_rows(given, given["completion_mask"])


@pytest.fixture(scope="module")
def likelihoods(policy, reference, rows):
    """Log-probabilities of both, numbers of tokens, and what takes a gradient of the former back
    to the policy: compiled once for all losses."""

    @jax.jit
    def back(policy, gradient_BE):
        return jax.vjp(lambda policy: completion_logps(policy, rows)[0], policy)[1](gradient_BE)[0]

    ours, tokens = jax.jit(completion_logps)(policy, rows)
    theirs, _ = jax.jit(completion_logps)(reference, rows)
    return ours, tokens, theirs, partial(back, policy)


@pytest.mark.parametrize("tag", TAGS)
def test_losses_and_gradients(tag, likelihoods, tmp_path):
    ours, tokens, theirs, back = likelihoods
    pairs = partial(compare, **options(tag))
    gradient = jax.grad(lambda ours: pairs(ours, tokens, theirs).losses.mean())(ours)
    each = pairs(ours, tokens, theirs).losses
    assert_objective(tag, CASE, each.mean(), back(gradient), each, tmp_path)


def test_the_objective_as_a_whole(policy, reference, rows, tmp_path):
    def loss(policy):
        pair, batch = ModelPair(policy, reference), PreferenceBatch(rows)
        return dpo(pair, batch, **options(TAG))[0], preferences(pair, batch, **options(TAG)).losses

    (value, each), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(policy)
    assert_objective(TAG, CASE, value, gradients, each, tmp_path)


def test_log_probabilities_and_rewards(likelihoods):
    _, expected, tolerances = CASE
    ours, tokens, theirs, _ = likelihoods
    found = {}
    for name, logps in (("policy", ours), ("reference", theirs)):
        found[f"{name}_chosen_logps"], found[f"{name}_rejected_logps"] = np.split(logps, 2)
    for beta in (0.1, 0.3):
        pairs = compare(ours, tokens, theirs, kind="sigmoid", beta=beta)
        found[f"rewards_chosen_beta{beta}"] = pairs.rewards_chosen
        found[f"rewards_rejected_beta{beta}"] = pairs.rewards_rejected
    assert len(found) == 8
    for name, value in found.items():
        assert_within(value, expected[name], tolerances[name], name)
