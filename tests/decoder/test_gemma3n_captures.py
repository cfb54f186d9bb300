"""What can be captured inside a Gemma 3n beyond what transformers returns."""

import chex
import numpy as np
import pytest
import tiny

from gemma_jax import forward

NAMES = ("laurel", "altup_predictions", "altup_mixtures", "altup_gains", "per_layer_gates")


def test_shapes():
    model = tiny.model(tiny.gemma3n())
    out = forward(model, tiny.tokens(model.cfg, 2, 5), capture=(*NAMES, "sparsity_masks"))
    dims = chex.Dimensions(**model.cfg.sizes, B=2, T=5)
    for name, letters in zip(NAMES, ("LBTD", "LABTD", "LBTAA", "LBTA", "LBTP"), strict=True):
        chex.assert_shape(out.captured[name], dims[letters])
    masks = np.asarray(out.captured["sparsity_masks"])
    assert masks.shape == (sum(s.sparsity > 0 for s in model.cfg.layers), 2, 5, 48)
    assert 0 < masks.mean() < 0.4


def test_a_part_that_the_model_lacks():
    model = tiny.model(tiny.gemma3(layers=1))
    with pytest.raises(ValueError, match="no part to capture laurel from"):
        forward(model, tiny.tokens(model.cfg, 1, 3), capture=("laurel", "final_norm"))
