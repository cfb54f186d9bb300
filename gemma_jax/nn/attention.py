"""Grouped-query attention with rotary positions, over new keys alone or over a cache."""

import jax
from flax import nnx

from gemma_jax.cache import LayerCache, extend
from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.context import Context
from gemma_jax.nn.einsum import Einsum
from gemma_jax.nn.norm import RMSNorm
from gemma_jax.nn.rope import rotate
from gemma_kernels.attention import AttentionSpec, attention, attention_weights


class Attention(nnx.Module):
    """Attention of one layer; local or global by its spec.

    Gemma 3 normalises each query and key head before rotating it, with one scale vector for all
    heads (hf `Gemma3Attention`). Gemma 1 and 2 do not.
    """

    def __init__(self, cfg: GemmaConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.scale = cfg.query_pre_attn_scalar**-0.5
        self.soft_cap = cfg.attn_soft_cap
        self.q = Einsum("BTD,NHD->BTNH", cfg.sizes, rngs=rngs)
        self.k = Einsum("BTD,KHD->BTKH", cfg.sizes, rngs=rngs)
        self.v = Einsum("BTD,KHD->BTKH", cfg.sizes, rngs=rngs)
        self.o = Einsum("BTNH,DNH->BTD", cfg.sizes, rngs=rngs)
        self.q_norm = RMSNorm("H", cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = RMSNorm("H", cfg.head_dim, cfg.norm_eps) if cfg.qk_norm else None

    def __call__(
        self, x_BTD: jax.Array, ctx: Context, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None, dict[str, jax.Array]]:
        """`[B, T, D]`, the layer's cache after this pass, and captured intermediates."""
        numerics = ctx.runtime.numerics
        q_BTNH, k_BTKH, v_BTKH = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.q_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH, numerics), self.k_norm(k_BTKH, numerics)
        q_BTNH = rotate(q_BTNH, ctx.table(self.spec), numerics)
        k_BTKH = rotate(k_BTKH, ctx.table(self.spec), numerics)
        if numerics.scale_queries:
            q_BTNH = q_BTNH * self.scale

        keys, values, kv_pos_BS, in_order = k_BTKH, v_BTKH, ctx.pos_BT, True
        if cache is not None:
            slots = ctx.slots[cache.k_BSKH.shape[1]]
            keys, values, cache = extend(cache, k_BTKH, v_BTKH, slots)
            kv_pos_BS, in_order = slots.kv_pos_BS, slots.order_BS is not None

        spec = AttentionSpec(
            scale=1.0 if numerics.scale_queries else self.scale,
            soft_cap=self.soft_cap,
            window=self.spec.window if in_order and ctx.causal else None,
            softmax_in_float32=numerics.softmax_in_float32,
        )
        lo_BT, hi_BT = ctx.interval(self.spec)
        mask = dict(lo_BT=lo_BT, hi_BT=hi_BT, kv_pos_BS=kv_pos_BS)
        out_BTNH = attention(
            q_BTNH, keys, values, **mask, spec=spec, implementation=ctx.runtime.attention_impl
        )
        taps = {}
        if "attention_weights" in ctx.capture:
            taps["attention_weights"] = attention_weights(q_BTNH, keys, **mask, spec=spec)
        return self.o(out_BTNH), cache, taps
