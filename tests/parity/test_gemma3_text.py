"""Numbers of transformers' Gemma 3, float32, on tiny models whose every part matters.

`data/` holds inputs and outputs of transformers 5.23 (see `make_goldens.py`). The tolerance of each
output is ten times the rounding noise measured when it was made: the larger of the distance to a
float64 run and to a run with another order of summation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import nightly
from parity.goldens import (
    DATA,
    assert_close,
    assert_continues,
    assert_gradient,
    case,
    loss_gradient,
)

from gemma_checkpoints import load_weights
from gemma_jax import Runtime, forward
from gemma_jax.decoder.batch import Batch
from gemma_jax.numerics import NUMERICS

CAPTURES = ("embeddings", "layer_outputs", "final_norm")


@pytest.fixture(scope="module", params=["unrolled", *nightly("scan")])
def model(request):
    return load_weights(DATA / "g3_text", dtype="float32", layout=request.param)


@pytest.mark.parametrize("folder, name", [("g3_text", "forward"), ("g3_mm", "forward_text_only")])
def test_logits_and_every_layer(folder, name):
    model = load_weights(DATA / folder, dtype="float32")
    given, expected, tolerance = case(folder, name)
    out = forward(model, given["input_ids"].astype(np.int32), capture=CAPTURES)
    assert_close(out.logits, expected["logits"], tolerance["logits"])
    for key in CAPTURES:
        assert_close(out.captured[key], expected[key], tolerance[key])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_padded_batch(implementation):
    model = load_weights(
        DATA / "g3_text", dtype="float32", runtime=Runtime(attention_impl=implementation)
    )
    for name in ("batch_left_pad", "batch_right_pad"):
        given, expected, tolerance = case("g3_text", name)
        real = given["attention_mask"] == 1
        positions = np.where(real, given["position_ids"], -1).astype(np.int32)
        out = forward(
            model, Batch(given["input_ids"].astype(np.int32), positions), capture=("final_norm",)
        )
        real = real[..., None]
        assert_close(out.logits, expected["logits"], tolerance["logits"], real)
        assert_close(
            out.captured["final_norm"], expected["final_norm"], tolerance["final_norm"], real
        )


@pytest.mark.parametrize("name", ["generate", "generate_left_pad"])
def test_greedy_continuations(model, name):
    assert_continues(model, "g3_text", name)


def test_gradients(model, tmp_path):
    _, expected, tolerance = case("g3_text", "gradients")
    value, grads = loss_gradient(model, "g3_text")
    assert_close(value, expected["loss"], tolerance["loss"])
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)))
    assert_close(norm, expected["grad_global_norm"], tolerance["grad_global_norm"])
    assert_gradient(grads, "g3_text", tmp_path / "grads", least=14)


def test_bfloat16_is_as_good_as_the_reference():
    """bfloat16 depends on the order of every rounding, so its error is compared, not its values."""
    given, expected, _ = case("g3_text", "forward_bf16")
    reference = np.abs(expected["logits_bf16"] - expected["logits_fp32"]).mean()
    for numerics in NUMERICS.values():
        runtime = Runtime(dtype=jnp.dtype("bfloat16"), numerics=numerics)
        model = load_weights(DATA / "g3_text", dtype="bfloat16", runtime=runtime)
        logits = np.asarray(forward(model, given["input_ids"].astype(np.int32)).logits)
        assert np.abs(logits - expected["logits_fp32"]).mean() <= 1.5 * reference


def test_numerics_agree_in_float32(model):
    """`gdm` differs from `hf` in rounding alone, which float32 shows as noise."""
    given, expected, tolerance = case("g3_text", "forward")
    gdm = load_weights(DATA / "g3_text", dtype="float32", runtime=Runtime(numerics=NUMERICS["gdm"]))
    logits = forward(gdm, given["input_ids"].astype(np.int32)).logits
    assert_close(logits, expected["logits"], tolerance["logits"])
