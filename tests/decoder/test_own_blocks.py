"""Layers of a user's own, by a factory: they can do all that a model of plain ones can."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

import gemma_jax as gj
from gemma_jax.decoder.attention import Attention
from gemma_jax.nn.ffn import FeedForward
from gemma_jax.placement import shard
from gemma_jax.sharding import make_mesh
from gemma_jax.weights.tree import flat_params, with_params

CFG = tiny.gemma3(layers=3)


class SquaredReLU(nnx.Module):
    """A feed-forward of Flax's own layers, without a gate and without letters."""

    def __init__(self, cfg, spec, *, rngs):
        self.up = nnx.Linear(cfg.d_model, spec.d_ff, rngs=rngs)
        self.down = nnx.Linear(spec.d_ff, cfg.d_model, rngs=rngs)

    def __call__(self, x_BTD):
        return self.down(nnx.relu(self.up(x_BTD)) ** 2)


class SquaredBlock(gj.Block):
    def __init__(self, cfg, spec, *, rngs):
        super().__init__(cfg, spec, rngs=rngs)
        self.ffn = SquaredReLU(cfg, spec, rngs=rngs)


class GatedAttention(Attention):
    """Attention whose result is gated by its input."""

    def __init__(self, cfg, spec, *, rngs):
        super().__init__(cfg, spec, rngs=rngs)
        self.gate = nnx.Linear(cfg.d_model, cfg.d_model, rngs=rngs)

    def __call__(self, x_BTD, ctx, cache):
        y_BTD, *others = super().__call__(x_BTD, ctx, cache)
        return y_BTD * jax.nn.sigmoid(self.gate(x_BTD)), *others


class GatedBlock(gj.Block):
    def __init__(self, cfg, spec, *, rngs):
        super().__init__(cfg, spec, rngs=rngs)
        self.attn = GatedAttention(cfg, spec, rngs=rngs)


class ParallelBlock(gj.Block):
    """Attention and feed-forward read the same normalised stream, as in PaLM and GPT-J."""

    def compute(self, x_BTD, ctx, cache, width):
        normed_BTD = self.pre_attn_norm(x_BTD, ctx.runtime.numerics)
        attended_BTD, cache, kv, captured = self.attn(normed_BTD, ctx, cache)
        fed_BTD, masks = self.ffn(normed_BTD)
        return x_BTD + attended_BTD + fed_BTD, cache, kv, captured | masks


BLOCKS = (SquaredBlock, GatedBlock, ParallelBlock)


@pytest.fixture(scope="module")
def ids():
    return tiny.tokens(CFG, 2, 11)


@pytest.mark.parametrize("block", BLOCKS)
def test_layouts_and_caches_agree(block, ids):
    scan = tiny.model(CFG, block=block)
    whole = gj.forward(scan, ids).logits
    unrolled = tiny.relayout(scan, "unrolled")
    np.testing.assert_allclose(gj.forward(unrolled, ids).logits, whole, atol=1e-5)
    first = gj.forward(
        scan, ids[:, :7], cache=gj.init_cache(CFG, scan.layer_groups, 2, 16, "float32")
    )
    rest = gj.forward(scan, ids[:, 7:], cache=first.cache)
    parts = jnp.concatenate([first.logits, rest.logits], axis=1)
    np.testing.assert_allclose(parts, whole, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_is_the_one_that_computes(block, ids):
    """With the parameters of a model with plain blocks, as far as both have them."""
    own, plain = tiny.model(CFG, block=block), tiny.model(CFG)
    shared = flat_params(own).keys() & flat_params(plain).keys()
    own = with_params(own, {path: flat_params(plain)[path].get_value() for path in shared})
    found, usual = (gj.forward(one, ids).logits for one in (own, plain))
    assert float(jnp.abs(found - usual).max()) > 1e-2


def test_a_feed_forward_by_definition(ids):
    """One layer: the stream after it is that before the feed-forward and the feed-forward's own."""
    cfg = replace(CFG, layers=CFG.layers[:1], post_norms=False)
    model = tiny.model(cfg, block=SquaredBlock)
    x_BTD = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, cfg.d_model)), jnp.float32)
    ffn = jax.tree.map(lambda a: a[0], model.blocks[0][0].ffn)
    up, down = ffn.up, ffn.down
    hidden = np.maximum(x_BTD @ up.kernel[...] + up.bias[...], 0) ** 2
    np.testing.assert_allclose(ffn(x_BTD), hidden @ down.kernel[...] + down.bias[...], atol=1e-4)


def test_generation_is_greedy_decoding(ids):
    model = tiny.model(CFG, block=SquaredBlock)
    done = gj.generate(model, None, [ids[0].tolist()], max_new_tokens=5, stop_ids=())[0]
    line = [*ids[0].tolist(), *done.token_ids]
    best = np.argmax(gj.forward(model, np.array([line])).logits[0], -1)
    assert [int(best[i]) for i in range(len(ids[0]) - 1, len(line) - 1)] == done.token_ids


def test_gradients_reach_all_of_it(ids):
    trained, frozen, join = gj.trainable(tiny.model(CFG, block=SquaredBlock))
    gradients = jax.grad(lambda trained: gj.loss(join(trained, frozen), ids))(trained)
    inside = {path: g for path, g in gradients.items() if "up" in path or "down" in path}
    assert inside and all(float(jnp.abs(g).max()) > 0 for g in inside.values())


def test_a_mesh(ids):
    """What has letters is split, what has none is whole on every device."""
    model = tiny.model(CFG, block=SquaredBlock)
    spread = shard(model, make_mesh(CFG, jax.devices()[:2], tensor=2))
    params = flat_params(spread)
    for path, param in params.items():
        whole = param.get_value().sharding.is_fully_replicated
        assert whole == ("ffn" in path or "scale" in path), path
    expected = gj.forward(model, ids).logits
    np.testing.assert_allclose(gj.forward(spread, ids).logits, expected, atol=2e-5)


def test_slices_need_to_know_which_axis_is_cut():
    model = tiny.model(CFG, "unrolled", block=SquaredBlock)
    half = gj.matformer.Slice(ffn_widths=(24,) * 3)
    message = (
        r"blocks.0.0.ffn.down.kernel cannot be sliced: \[1, 24, 32\] of \[1, 48, 32\] is wanted"
    )
    for cut in (gj.matformer.slice, gj.matformer.at):
        with pytest.raises(ValueError, match=message):
            cut(model, half)
    gated = tiny.model(CFG, "unrolled", block=GatedBlock)
    assert isinstance(gj.matformer.slice(gated, half).blocks[0][0].attn, GatedAttention)


def test_a_factory_may_choose_by_the_spec(ids):
    """Global layers alone have other blocks."""

    def make(cfg, spec, *, rngs):
        return (SquaredBlock if spec.kind == "global" else gj.Block)(cfg, spec, rngs=rngs)

    model = tiny.model(CFG, block=make)
    kinds = [
        type(model.blocks[i][position].ffn)
        for i, group in enumerate(model.layer_groups)
        for _ in range(group.repeats)
        for position in range(len(group.period))
    ]
    assert kinds == [FeedForward, FeedForward, SquaredReLU]
    assert np.isfinite(gj.loss(model, ids))


def test_a_block_must_return_what_the_stack_expects(ids):
    class Forgetful(gj.Block):
        def __call__(self, x, ctx, cache, inputs):
            return super().__call__(x, ctx, cache, inputs).x

    with pytest.raises(TypeError, match="Forgetful must return a LayerOutput, got"):
        gj.forward(tiny.model(CFG, block=Forgetful), ids)


class LoRA(nnx.Module):
    def __init__(self, inner, a, b):
        self.inner, self.a, self.b = inner, nnx.Param(a), nnx.Param(b)

    def __call__(self, x_BTD):
        return self.inner(x_BTD) + jnp.einsum("btd,dr,rnh->btnh", x_BTD, self.a[...], self.b[...])


@pytest.mark.parametrize("layout", ["scan", "unrolled"])
def test_modules_put_into_a_model_need_the_axis_of_layers(layout, ids):
    model = tiny.model(CFG, layout)
    before = gj.forward(model, ids).logits
    query = model.blocks[0][0].attn.q
    D, N, H = CFG.d_model, CFG.num_heads, CFG.head_dim
    model.blocks[0][0].attn.q = LoRA(query, jnp.ones((D, 2)), jnp.ones((2, N, H)))
    with pytest.raises(ValueError, match=r"blocks.0.0.attn.q.a has shape \[32, 2\], expected"):
        gj.forward(model, ids)
    L = model.layer_groups[0].repeats
    model.blocks[0][0].attn.q = LoRA(query, jnp.ones((L, D, 2)), jnp.ones((L, 2, N, H)))
    assert float(jnp.abs(gj.forward(model, ids).logits - before).max()) > 1e-3
