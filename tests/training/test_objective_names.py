"""Objectives by name: what a config may say, and what is refused before anything runs."""

import inspect

import jax
import numpy as np
import pytest
import tiny

from gemma_jax.matformer import Slice
from gemma_jax.training.model_pair import ModelPair
from gemma_jax.training.objective_names import OBJECTIVES, named_objective
from gemma_jax.training.objectives import TrainBatch, elastic, next_token
from gemma_jax.training.preference import PreferenceBatch, dpo

CFG = tiny.gemma1()
TOKENS = tiny.tokens(CFG, 2, 7)


def test_a_name_with_options_is_the_function_with_them():
    model, other = tiny.model(CFG, "unrolled"), tiny.model(CFG, seed=1)
    ours, _ = named_objective("next_token", z_loss=1)(model, TOKENS, None)
    np.testing.assert_array_equal(ours, next_token(model, TOKENS, z_loss=1.0)[0])
    answers = np.ones(TOKENS.shape, np.float32)
    batch, pair = PreferenceBatch(TrainBatch(TOKENS, weights_BT=answers)), ModelPair(model, other)
    ours, _ = named_objective("dpo", kind="ipo", beta=0.5)(pair, batch, None)
    np.testing.assert_array_equal(ours, dpo(pair, batch, kind="ipo", beta=0.5)[0])
    key = jax.random.key(0)
    config = {"submodels": [{"ffn_widths": 24}], "widths": [8, 24], "alpha": 0.5}
    ours, _ = named_objective("elastic", **config)(model, TOKENS, key)
    options = {"submodels": (Slice(ffn_widths=24),), "widths": (8, 24), "alpha": 0.5}
    np.testing.assert_array_equal(ours, elastic(model, TOKENS, key, **options)[0])


def test_losses_are_means_over_what_is_said():
    model, answers = tiny.model(CFG), np.ones(TOKENS.shape, np.float32)
    pair = ModelPair(model, model)
    batches = {"dpo": PreferenceBatch(TrainBatch(TOKENS, weights_BT=answers))}
    for name, entry in OBJECTIVES.items():
        given = model if entry.other is None else pair
        _, metrics = named_objective(name)(given, batches.get(name, TOKENS), None)
        assert metrics[entry.mean_over] == (1 if name == "dpo" else 12)
        assert {"tokens", "pairs"} & metrics.keys() == {entry.mean_over}
        assert entry.other is None or entry.other in entry.options


@pytest.mark.parametrize("name", OBJECTIVES)
def test_defaults_are_possible(name):
    entry = OBJECTIVES[name]
    defaults = {name: p.default for name, p in entry.options.items()}
    assert inspect.Parameter.empty not in defaults.values()
    named_objective(name, **defaults)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("dop", {}, "there is no objective 'dop'; did you mean 'dpo'?"),
        ("x", {}, "no objective 'x'; choose from next_token, dpo, distill, elastic"),
        ("dpo", {"bta": 1}, "the objective 'dpo' has no option 'bta'; did you mean 'beta'?"),
        ("distill", {"beta": 1}, "the objective 'distill' has no option 'beta'; "),
        ("dpo", {"beta": "0.1"}, "beta must be a number, got '0.1'"),
        ("dpo", {"kind": "ipo_sum"}, "kind='ipo_sum' must be 'sigmoid'"),
        ("dpo", {"label_smoothing": 0.1}, "is not part of kind='sigmoid'"),
        ("distill", {"top_k": 2.5}, "top_k must be an integer or None, got 2.5"),
        ("distill", {"teacher": "gemma3-4b"}, "must be a function from a model to its teacher"),
        ("elastic", {"widths": [0.5]}, r"widths\[0\] must be an integer, got 0.5"),
        ("elastic", {"submodels": [{"width": 3}]}, "must say ffn_widths and skip_layers"),
    ],
)
def test_other_names_options_and_values_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        named_objective(name, **options)
