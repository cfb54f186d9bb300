"""Grouped-query attention with rotary positions: over new keys, a cache, or a layer's before it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.config import GemmaConfig, LayerSpec
from gemma_jax.decoder.attend import attend, weigh
from gemma_jax.decoder.cache import KeysValues, LayerCache, extend, write_heads, write_heads_on
from gemma_jax.decoder.context import Context
from gemma_jax.nn.einsum import Einsum
from gemma_jax.nn.norm import RMSNorm, rms_norm
from gemma_jax.nn.rope import rotate
from gemma_jax.remat import keep
from gemma_kernels.attention import AttentionSpec, Mask, attention_weights


class Attention(nnx.Module):
    """Attention of one layer; local or global by its spec.

    Gemma 3 normalises each query and key head before rotating it, with one scale vector for all
    heads (hf `Gemma3Attention`). Gemma 1 and 2 do not. Gemma 3n normalises the values too, and its
    last layers have no keys and values of their own (hf `Gemma3nTextAttention`). Of Gemma 4, global
    layers have heads of another size, and some make values of the keys' projection (hf
    `Gemma4TextAttention`).
    """

    def __init__(self, cfg: GemmaConfig, spec: LayerSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        sizes = cfg.layer_sizes(spec)
        self.scale = cfg.query_pre_attn_scalar**-0.5
        self.soft_cap = cfg.attn_soft_cap

        def norm() -> RMSNorm | None:
            if not cfg.qk_norm:
                return None
            return RMSNorm(cfg, "H", size=sizes["H"])

        self.q = Einsum("BTD,NHD->BTNH", sizes, rngs=rngs)
        self.o = Einsum("BTNH,DNH->BTD", sizes, rngs=rngs)
        self.q_norm = norm()
        self.v_norm_eps = cfg.norm_eps if cfg.v_norm else None
        if spec.makes_keys:
            self.k = Einsum("BTD,KHD->BTKH", sizes, rngs=rngs)
            if spec.values == "own":
                self.v = Einsum("BTD,KHD->BTKH", sizes, rngs=rngs)
            self.k_norm = norm()

    def __call__(
        self, x_BTD: jax.Array, ctx: Context, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None, KeysValues, dict[str, jax.Array]]:
        """`[B, T, D]`, the layer's cache after this pass, what it attended to, and captures."""
        numerics = ctx.runtime.numerics
        q_BTNH = keep("attn_q", self.q(x_BTD))
        if self.q_norm is not None:
            q_BTNH = self.q_norm(q_BTNH, numerics)
        q_BTNH = rotate(q_BTNH, ctx.table(self.spec), numerics)
        if numerics.scale_queries:
            q_BTNH = q_BTNH * self.scale
        if (kv := ctx.shared_kv.get(self.spec.kind)) is None:
            kv, cache = self.keys_values(x_BTD, ctx, cache)

        spec = AttentionSpec(
            scale=1.0 if numerics.scale_queries else self.scale,
            soft_cap=self.soft_cap,
            window=self.spec.window if kv.in_order and ctx.in_order else None,
            softmax_in_float32=numerics.softmax_in_float32,
        )
        mask = Mask(*ctx.interval(self.spec), kv.kv_pos_BS)
        full = self.spec.window is None and not kv.in_order
        if ctx.static_mask:
            stated = replace(spec, causal=True)
            out_BTNH = attend(q_BTNH, kv, None, stated, ctx.runtime, full=full)
        else:
            out_BTNH = attend(q_BTNH, kv, mask, spec, ctx.runtime, full=full)
        captured = {}
        if "attention_weights" in ctx.capture:
            k_BKSH, _ = kv.kv.of_layer().widened(q_BTNH.dtype)
            k_BSKH = jnp.moveaxis(k_BKSH, 1, 2)
            weights_BNTS = attention_weights(q_BTNH, k_BSKH, **mask._asdict(), spec=spec)
            weights_BNTS = ctx.note(captured, "attention_weights", weights_BNTS)
            if "attention_weights" in ctx.patch:
                out_BTNH = weigh(weights_BNTS, kv, q_BTNH.dtype)
        out_BTD = keep("attn_out", self.o(keep("attn_context", out_BTNH)))
        return out_BTD, cache, kv, captured

    def keys_values(
        self, x_BTD: jax.Array, ctx: Context, cache: LayerCache | None
    ) -> tuple[KeysValues, LayerCache | None]:
        """New keys and values, or those of the cache and the new ones; and the cache after."""
        numerics = ctx.runtime.numerics
        k_BTKH = v_BTKH = keep("attn_k", self.k(x_BTD))
        if self.spec.values == "own":
            v_BTKH = keep("attn_v", self.v(x_BTD))
        if self.k_norm is not None:
            k_BTKH = self.k_norm(k_BTKH, numerics)
        if self.v_norm_eps is not None:
            v_BTKH = rms_norm(v_BTKH, self.v_norm_eps, numerics)
        k_BTKH = rotate(k_BTKH, ctx.table(self.spec), numerics)
        k_BKTH, v_BKTH = jnp.moveaxis(k_BTKH, 2, 1), jnp.moveaxis(v_BTKH, 2, 1)
        if cache is None:
            return KeysValues(LayerCache(k_BKTH, v_BKTH), ctx.pos_BT, in_order=True), None
        slots, partition = ctx.slots[cache.capacity], ctx.runtime.partition
        full = self.spec.window is None
        write = write_heads if partition is None else write_heads_on(partition, full)
        kv, cache = extend(cache, k_BKTH, v_BKTH, slots, write)
        return KeysValues(kv, slots.kv_pos_BS, in_order=slots.order_BS is not None), cache
