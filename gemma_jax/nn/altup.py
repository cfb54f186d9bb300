"""Alternating updates: A residual streams, of which each layer computes one and predicts the rest.

Baykal et al., "Alternating Updates for Efficient Transformers", 2023 (hf `Gemma3nTextAltUp`).

Local letters: E outputs of a square map; Z pairs of streams, A * A.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.config import GemmaConfig
from gemma_jax.nn.einsum import Einsum
from gemma_jax.nn.norm import RMSNorm
from gemma_jax.nn.note import Note, unnoted
from gemma_jax.numerics import Numerics
from gemma_jax.weights.contract import HIGHEST
from gemma_jax.weights.protocol import dense

MIN_MEAN_SQUARE = 1e-5


class AltUp(nnx.Module):
    """One layer's predictor and corrector of the streams `[A, B, T, D]`.

    Both mix with coefficients that a router reads off one stream: the predictor off the active
    stream before the layer, the corrector off what the layer made of it.
    """

    def __init__(self, cfg: GemmaConfig, *, rngs: nnx.Rngs):
        streams = cfg.altup.num_streams
        self.active, self.clip = cfg.altup.active, cfg.altup.coef_clip
        sizes = {**cfg.sizes, "E": streams, "Z": streams**2}
        self.router_norm = RMSNorm(cfg, "D")
        self.router = Einsum("BTD,AD->BTA", sizes, rngs=rngs)
        self.predictor = Einsum("BTA,ZA->BTZ", sizes, rngs=rngs)
        self.corrector = Einsum("BTA,EA->BTE", sizes, rngs=rngs)
        self.output_scale = (
            nnx.Param(jnp.ones(cfg.d_model), dims="D") if cfg.altup.correct_scale else None
        )

    def route(self, x_BTD: jax.Array, numerics: Numerics) -> jax.Array:
        """Mixing weights `[B, T, A]` in (-1, 1)."""
        scale = jnp.asarray(1 / x_BTD.shape[-1], x_BTD.dtype)
        routed_BTA = self.router(self.router_norm(x_BTD, numerics) * scale)
        return jnp.tanh(routed_BTA.astype(jnp.float32)).astype(x_BTD.dtype)

    def predict(self, x_ABTD: jax.Array, numerics: Numerics, note: Note = unnoted) -> jax.Array:
        """What the streams are expected to be after the layer.

        Each is itself plus a mixture of all; a row of `altup_mixtures [B, T, A, A]` makes one
        stream.
        """
        A, B, T, _ = x_ABTD.shape
        routed_BTA = self.route(x_ABTD[self.active], numerics)
        mix_BTEA = self._coefs(self.predictor, routed_BTA, numerics).reshape(B, T, A, A)
        mix_BTEA = note("altup_mixtures", mix_BTEA)
        mixed_EBTD = jnp.einsum("ABTD,BTEA->EBTD", x_ABTD, mix_BTEA, precision=HIGHEST)
        return x_ABTD + mixed_EBTD

    def correct(
        self,
        predicted_ABTD: jax.Array,
        y_BTD: jax.Array,
        numerics: Numerics,
        note: Note = unnoted,
    ) -> jax.Array:
        """The predictions, moved towards the layer's result by `altup_gains [B, T, A]`."""
        routed_BTA = self.route(y_BTD, numerics)
        gain_BTE = note("altup_gains", 1 + self._coefs(self.corrector, routed_BTA, numerics))
        innovation_BTD = y_BTD - predicted_ABTD[self.active]
        return predicted_ABTD + innovation_BTD * jnp.moveaxis(gain_BTE, -1, 0)[..., None]

    def scaled(self, x_ABTD: jax.Array) -> jax.Array:
        """The active stream, as the per-layer input reads it."""
        x_BTD = x_ABTD[self.active]
        return x_BTD if self.output_scale is None else x_BTD * self.output_scale[...]

    def _coefs(self, layer: Einsum, routed_BTA: jax.Array, numerics: Numerics) -> jax.Array:
        if not numerics.clip_altup or self.clip is None:
            return layer(routed_BTA)
        w = jnp.clip(dense(layer.w.get_value()), -self.clip, self.clip).astype(routed_BTA.dtype)
        return jnp.einsum(layer.equation, routed_BTA, w, precision=HIGHEST)


class Streams(nnx.Module):
    """From one stream to A and back; each map keeps the magnitude of the first stream."""

    def __init__(self, cfg: GemmaConfig, *, rngs: nnx.Rngs):
        sizes = {**cfg.sizes, "E": cfg.d_model}

        def maps() -> nnx.List:
            others = range(cfg.altup.num_streams - 1)
            return nnx.List(Einsum("BTD,ED->BTE", sizes, rngs=rngs) for _ in others)

        self.spread_maps, self.merge_maps = maps(), maps()

    def spread(self, x_BTD: jax.Array) -> jax.Array:
        """`[B, T, D]` to `[A, B, T, D]`, the first of which is `x_BTD` itself."""
        size_BT1 = _magnitude(x_BTD)
        return jnp.stack([x_BTD, *(_resized(f(x_BTD), size_BT1) for f in self.spread_maps)])

    def merge(self, x_ABTD: jax.Array) -> jax.Array:
        """The mean of the first stream and the others, mapped back."""
        size_BT1 = _magnitude(x_ABTD[0])
        back = [_resized(f(x), size_BT1) for f, x in zip(self.merge_maps, x_ABTD[1:])]
        return jnp.mean(jnp.stack([x_ABTD[0], *back]), axis=0)


def _magnitude(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True))


def _resized(x: jax.Array, size: jax.Array) -> jax.Array:
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * size / jnp.sqrt(jnp.maximum(mean_square, MIN_MEAN_SQUARE))
