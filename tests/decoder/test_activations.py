"""The activation that a config names is the one that gates are put through."""

import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from gemma_jax import forward
from gemma_jax.nn.ffn import FeedForward
from gemma_jax.nn.per_layer import PerLayerInput
from gemma_jax.numerics import NUMERICS

# Hendrycks & Gimpel 2016 (GELU, exactly and by tanh); Elfwing et al. 2017 (SiLU).
DEFINITIONS = {
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
}


@pytest.mark.parametrize("name", list(DEFINITIONS))
def test_gates_by_definition(name):
    """Inputs up to 6 deviations, where the two GELUs differ by 5e-4."""
    cfg = replace(tiny.gemma3n(), activation=name)
    x_BTD = jnp.linspace(-6, 6, 3 * cfg.d_model, dtype=jnp.float32).reshape(1, 3, -1)
    act = np.vectorize(DEFINITIONS[name])

    ffn = FeedForward(cfg, cfg.layers[-1], rngs=nnx.Rngs(0))
    expected = ffn.down(jnp.float32(act(ffn.gate(x_BTD))) * ffn.up(x_BTD))
    np.testing.assert_allclose(ffn(x_BTD)[0], expected, atol=1e-5)

    gated = PerLayerInput(cfg, rngs=nnx.Rngs(0))
    vector_BTP = jnp.ones((1, 3, cfg.per_layer.width))
    captured = {}
    gated(x_BTD, vector_BTP, NUMERICS["hf"], captured.setdefault)
    np.testing.assert_allclose(captured["per_layer_gates"], act(gated.gate(x_BTD)), atol=1e-5)


def test_every_activation_gives_another_model():
    ids = tiny.tokens(tiny.gemma3(2), 1, 9)
    logits = [
        forward(tiny.model(replace(tiny.gemma3(2), activation=name)), ids).logits
        for name in DEFINITIONS
    ]
    for i, one in enumerate(logits):
        assert all(float(jnp.abs(one - other).max()) > 1e-4 for other in logits[i + 1 :])
