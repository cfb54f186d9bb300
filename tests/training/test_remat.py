"""What a layer keeps for its gradient: the same gradient, in less memory by every policy."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest
import tiny
from marks import nightly

import gemma_jax as gj
from gemma_jax import remat
from gemma_jax.runtime import Runtime
from gemma_jax.weights.tree import with_attributes

CFG = tiny.gemma3(layers=4, every=2)
TOKENS = tiny.tokens(CFG, 2, 16)


def with_policy(policy, model=None):
    model = model or tiny.model(CFG, "scan")
    return with_attributes(model, runtime=replace(model.runtime, remat=policy))


def kept_bytes(policy):
    """Of all that passes from the forward to the backward pass, the weights left out."""
    model = with_policy(policy)
    _, backward = jax.eval_shape(lambda m: jax.vjp(lambda m: gj.loss(m, TOKENS), m), model)
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(backward))


@pytest.fixture(scope="module")
def expected():
    return jax.jit(jax.grad(gj.loss))(with_policy("none"), TOKENS)


@pytest.mark.parametrize(
    "policy",
    [
        *("minimal", "save_qkv", "full", "offload"),
        *nightly("minimal_with_context", "save_all_but_hidden", "save_attention", "save_out"),
        *nightly("offload_qkv"),
    ],
)
def test_gradients_are_the_same(policy, expected):
    gradients = jax.jit(jax.grad(gj.loss))(with_policy(policy), TOKENS)
    for ours, theirs in zip(*map(jax.tree.leaves, (gradients, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_every_policy_is_smaller_than_the_one_before():
    sizes = [kept_bytes(policy) for policy in ("none", *remat.SAVED, "full")]
    order = dict(zip(("none", *remat.SAVED, "full"), sizes, strict=True))
    # `save_out` is narrower than queries, keys and values; all others are part of the one before.
    assert sizes == sorted(sizes, reverse=True), order
    assert len(set(sizes)) == len(sizes), order


def test_every_name_is_one_that_a_layer_has():
    """A name that nothing has would keep nothing, without a word."""
    text = str(jax.make_jaxpr(lambda m: gj.loss(m, TOKENS))(with_policy("none")))
    for names in (*remat.SAVED.values(), *remat.OFFLOADED.values()):
        for name in names:
            assert f"name={name}" in text, name


def test_what_is_kept_is_what_the_policy_says():
    layers, B, T = len(CFG.layers), *TOKENS.shape
    widths = {name: CFG.sizes[name] for name in "NKHD"}
    qkv = (widths["N"] + 2 * widths["K"]) * widths["H"]
    least = kept_bytes("full")
    assert kept_bytes("save_qkv") - least == 4 * layers * B * T * qkv
    assert kept_bytes("save_out") - least == 4 * layers * B * T * widths["D"]
    hidden = sum(2 * spec.d_ff for spec in CFG.layers)
    more = kept_bytes("minimal") - kept_bytes("save_all_but_hidden")
    assert more == 4 * B * T * hidden


def test_offloaded_results_lie_on_the_host():
    text = str(jax.make_jaxpr(jax.grad(lambda m: gj.loss(m, TOKENS)))(with_policy("offload_qkv")))
    assert "pinned_host" in text or "Host" in text


def test_booleans_are_the_ends():
    assert Runtime().remat_policy == "none"
    assert Runtime(remat=True).remat_policy == "full"


def test_unknown_policies_are_refused_by_name():
    with pytest.raises(ValueError, match="remat='save_everything' must be one of: none, minimal_"):
        Runtime(remat="save_everything")


def test_hosts_without_such_memory_are_refused():
    class Device:
        platform = "npu"

        def addressable_memories(self):
            return ()

    with pytest.raises(ValueError, match="remat='offload' needs memory of kind pinned_host, which"):
        remat.checkpointed(lambda x: x, "offload", Device())
