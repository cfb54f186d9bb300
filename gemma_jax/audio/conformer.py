"""The conformer, the tower that hears: frames of log-mel to one vector per 160 milliseconds.

x = subsampling(mel)
for each layer:  x = x + half of ffn(x)
                 x = x + norm(attention(norm(x)))
                 x = x + convolution(norm(x))
                 x = x + half of ffn(x)
                 x = norm(x)
every fourth frame

Attention is causal and local: a frame sees itself and a dozen before, and scores take part of their
value from the distance alone. The convolution runs over a few frames, one channel at a time, and is
causal as well. So a clip may come in pieces: a layer needs the keys and values of the last dozen
frames, and what went into its convolution in the last few (`ConformerCache`).
hf `Gemma3nAudioEncoder`.

Local letters: I clips; C width of the tower; M mel bands; J blocks of frames; Q frames of a block;
R distances that attention sees, from far to near; Z channels of the convolution; W value and gate;
U one; X frames that the convolution sees.
"""

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.audio.subsampling import ConvState, Span, Subsampling
from gemma_jax.encoder_config import AudioConfig
from gemma_jax.nn.einsum import Einsum
from gemma_jax.nn.layer_groups import Layout, group_layers
from gemma_jax.nn.layer_stack import Caches, LayerOutput, run_layers, stack_layers
from gemma_jax.nn.norm import RMSNorm
from gemma_jax.runtime import Runtime
from gemma_jax.weights.contract import HIGHEST

EPS = 1e-6  # of all norms but the convolutions', whatever a config says (hf)
LONGEST_WAVE = 10_000.0  # of the sinusoids for distances, over 2 pi, in frames


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ConformerContext:
    """What all layers of one pass share; the tower's part of `Context`."""

    span: Span
    runtime: Runtime = field(metadata={"static": True})
    capture: frozenset[str] = field(default=frozenset(), metadata={"static": True})

    def place(self, x_ITC: jax.Array) -> jax.Array:
        """The stream where a mesh has it: whole on every device, as clips are few."""
        partition = self.runtime.partition
        return x_ITC if partition is None else partition.constrain(x_ITC)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ConformerCache:
    """What a layer keeps of the frames before; or several layers, stacked along the first axis.

    Attributes:
      k_ISNH, v_ISNH: Keys and values of the frames that the next one sees.
      conv_IXZ: What went into the convolution in the frames that the next one sees.
      layer: int32; the one of the stack that is meant.
    """

    k_ISNH: jax.Array
    v_ISNH: jax.Array
    conv_IXZ: jax.Array
    layer: jax.Array | None = None

    @classmethod
    def empty(cls, cfg: AudioConfig, clips: int, dtype) -> "ConformerCache":
        """That of clips which are about to begin."""
        seen, heads = cfg.left_context - 1, (cfg.num_heads, cfg.sizes["H"])
        kv_ISNH = jnp.zeros((clips, seen, *heads), dtype)
        conv_IXZ = jnp.zeros((clips, cfg.depthwise_kernel - 1, cfg.d_tower), dtype)
        return cls(k_ISNH=kv_ISNH, v_ISNH=kv_ISNH, conv_IXZ=conv_IXZ)

    def of_layer(self) -> "ConformerCache":
        """That of the layer alone."""
        if self.layer is None:
            return self
        return jax.tree.map(lambda a: a[self.layer], replace(self, layer=None))

    def put(self, new: "ConformerCache") -> "ConformerCache":
        """The same, or the stack, with `new` for the layer."""
        if self.layer is None:
            return new
        put = jax.tree.map(
            lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, self.layer, 0),
            replace(self, layer=None),
            new,
        )
        return replace(put, layer=self.layer)


class ConformerAttention(nnx.Module):
    """Attends to the frame itself and those before it, by content and by distance."""

    def __init__(self, cfg: AudioConfig, *, rngs: nnx.Rngs):
        sizes = cfg.sizes
        self.span, self.score_cap = cfg.left_context, cfg.score_cap
        self.q = Einsum("ITC,NHC->ITNH", sizes, rngs=rngs)
        self.k = Einsum("ITC,NHC->ITNH", sizes, rngs=rngs)
        self.v = Einsum("ITC,NHC->ITNH", sizes, rngs=rngs)
        self.o = Einsum("ITNH,CNH->ITC", sizes, rngs=rngs)
        self.distance = Einsum("RC,NHC->RNH", sizes, rngs=rngs)
        self.query_scale = nnx.Param(jnp.zeros(sizes["H"]), dims="H")

    def __call__(
        self, x_ITC: jax.Array, span: Span, old: ConformerCache
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The result, and keys and values of the frames that the next piece sees.

        Args:
          span: Of `x_ITC`.
          old: Of the layer, from the piece before.
        """
        H, T = self.query_scale.shape[-1], x_ITC.shape[1]
        # One at the scale that training starts from, where its softplus is ln 2.
        per_dim_H = jax.nn.softplus(self.query_scale[...].astype(jnp.float32)) / math.log(2)
        q_ITNH = self.q(x_ITC) * (per_dim_H * H**-0.5).astype(x_ITC.dtype)
        k_ISNH = jnp.concatenate([old.k_ISNH, self.k(x_ITC)], axis=1)
        v_ISNH = jnp.concatenate([old.v_ISNH, self.v(x_ITC)], axis=1)
        distance_RNH = self.distance(sinusoids(self.span, x_ITC.shape[-1]).astype(x_ITC.dtype))
        inside_IS = span.before(self.span - 1).inside(k_ISNH.shape[1])
        out_ITNH = banded_attention(q_ITNH, k_ISNH, v_ISNH, distance_RNH, inside_IS, self.score_cap)
        return self.o(out_ITNH), k_ISNH[:, T:], v_ISNH[:, T:]


def sinusoids(count: int, width: int) -> jax.Array:
    """A vector for each distance from `count - 1` down to 0: sines, then cosines, `[R, C]`."""
    waves = width // 2
    step = math.log(LONGEST_WAVE) / max(waves - 1, 1)
    frequencies = jnp.exp(jnp.arange(waves, dtype=jnp.float32) * -step)
    angles = jnp.arange(count - 1, -1, -1, dtype=jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def banded_attention(
    q_ITNH: jax.Array,
    k_ISNH: jax.Array,
    v_ISNH: jax.Array,
    distance_RNH: jax.Array,
    inside_IS: jax.Array,
    score_cap: float,
) -> jax.Array:
    """Attention of each frame to the last R, itself included.

    Queries are cut into blocks, and each block has the keys that any of its queries sees. The
    blocks are as long as a query sees back: half of the scores are of use then.

    Args:
      q_ITNH: Scaled queries.
      k_ISNH, v_ISNH: Of the same frames, with `R - 1` more in front.
      distance_RNH: What is added to a key at each distance, farthest first.
      inside_IS: bool; keys that are there.
      score_cap: `cap * tanh(x / cap)` on scores.
    """
    I, T, N, H = q_ITNH.shape
    R = distance_RNH.shape[0]
    Q = max(1, min(T, R - 1))
    J, S = -(-T // Q), Q + R - 1
    blocks = jnp.arange(J)[:, None] * Q + jnp.arange(S)

    def pad(x, axis_1):
        return jnp.pad(x, ((0, 0), (0, axis_1 - x.shape[1]), *((0, 0),) * (x.ndim - 2)))

    q_IJQNH = pad(q_ITNH, J * Q).reshape(I, J, Q, N, H)
    k_IJSNH, v_IJSNH, inside_IJS = (
        pad(x, J * Q + R - 1)[:, blocks] for x in (k_ISNH, v_ISNH, inside_IS)
    )
    scores_INJQS = jnp.einsum("IJQNH,IJSNH->INJQS", q_IJQNH, k_IJSNH, precision=HIGHEST)
    by_distance_INJQR = jnp.einsum("IJQNH,RNH->INJQR", q_IJQNH, distance_RNH, precision=HIGHEST)
    scores_INJQS += _by_key(by_distance_INJQR)
    scores_INJQS = jnp.tanh(scores_INJQS / score_cap) * score_cap
    farness_QS = jnp.arange(S) - jnp.arange(Q)[:, None]  # 0 for the farthest key that is seen
    seen = (farness_QS >= 0) & (farness_QS < R) & inside_IJS[:, None, :, None, :]
    scores_INJQS = jnp.where(seen, scores_INJQS, jnp.finfo(scores_INJQS.dtype).min)
    weights_INJQS = jax.nn.softmax(scores_INJQS.astype(jnp.float32), axis=-1)
    weights_INJQS = weights_INJQS.astype(v_ISNH.dtype)
    out_IJQNH = jnp.einsum("INJQS,IJSNH->IJQNH", weights_INJQS, v_IJSNH, precision=HIGHEST)
    return out_IJQNH.reshape(I, J * Q, N, H)[:, :T]


def _by_key(x_INJQR: jax.Array) -> jax.Array:
    """Moves row `q` by `q` to the right, `[I, N, J, Q, Q + R - 1]`: distances become keys.

    Rows that are longer by one than they are read as are moved by one each (Transformer-XL,
    appendix B).
    """
    *front, Q, R = x_INJQR.shape
    x = jnp.pad(x_INJQR, (*((0, 0),) * (len(front) + 1), (0, Q)))
    x = x.reshape(*front, Q * (Q + R))[..., : Q * (Q + R - 1)]
    return x.reshape(*front, Q, Q + R - 1)


class ConformerFeedForward(nnx.Module):
    """`x + weight * norm(down(silu(up norm(x))))`."""

    def __init__(self, cfg: AudioConfig, *, rngs: nnx.Rngs):
        self.clip, self.weight = cfg.clip, cfg.residual_weight
        self.pre_norm = RMSNorm(cfg, "C", eps=EPS)
        self.up = Einsum("ITC,FC->ITF", cfg.sizes, rngs=rngs)
        self.down = Einsum("ITF,CF->ITC", cfg.sizes, rngs=rngs)
        self.post_norm = RMSNorm(cfg, "C", eps=EPS)

    def __call__(self, x_ITC: jax.Array, runtime: Runtime) -> jax.Array:
        y_ITC = self.pre_norm(clip(x_ITC, self.clip), runtime.numerics)
        y_ITC = self.down(jax.nn.silu(self.up(y_ITC)))
        return x_ITC + self.post_norm(clip(y_ITC, self.clip), runtime.numerics) * self.weight


class ConformerConvolution(nnx.Module):
    """`x + end(silu(norm(convolution of a gated linear unit of norm(x))))`, causal in time."""

    def __init__(self, cfg: AudioConfig, *, rngs: nnx.Rngs):
        kernel, Z = cfg.depthwise_kernel, cfg.d_tower
        sizes = {"C": cfg.d_tower, "Z": Z, "W": 2}
        self.clip = cfg.clip
        self.pre_norm = RMSNorm(cfg, "C")
        self.start = Einsum("ITC,WZC->ITWZ", sizes, rngs=rngs)
        self.depthwise = nnx.Param(rngs.normal((Z, 1, kernel)) * kernel**-0.5, dims="ZUX")
        self.norm = RMSNorm(cfg, "C")
        self.end = Einsum("ITZ,CZ->ITC", sizes, rngs=rngs)

    def __call__(
        self, x_ITC: jax.Array, runtime: Runtime, before_IXZ: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The stream, and the last frames that went into the convolution.

        Args:
          before_IXZ: Those of the piece before.
        """
        T = x_ITC.shape[1]
        gated_ITWZ = self.start(self.pre_norm(x_ITC, runtime.numerics))
        y_ITZ = gated_ITWZ[:, :, 0] * jax.nn.sigmoid(gated_ITWZ[:, :, 1])
        all_ITZ = jnp.concatenate([before_IXZ, y_ITZ], axis=1)
        w_ZUX = self.depthwise[...].astype(x_ITC.dtype)
        y_ITZ = sum(all_ITZ[:, i : i + T] * w_ZUX[:, 0, i] for i in range(w_ZUX.shape[-1]))
        y_ITZ = self.norm(clip(y_ITZ, self.clip), runtime.numerics)
        return x_ITC + self.end(jax.nn.silu(y_ITZ)), all_ITZ[:, T:]


class ConformerBlock(nnx.Module):
    """One layer of the tower; the interface is that of the decoder's `Block`."""

    def __init__(self, cfg: AudioConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.ffn_start = ConformerFeedForward(cfg, rngs=rngs)
        self.pre_attn_norm = RMSNorm(cfg, "C", eps=EPS)
        self.attn = ConformerAttention(cfg, rngs=rngs)
        self.post_attn_norm = RMSNorm(cfg, "C", eps=EPS)
        self.conv = ConformerConvolution(cfg, rngs=rngs)
        self.ffn_end = ConformerFeedForward(cfg, rngs=rngs)
        self.norm = RMSNorm(cfg, "C", eps=EPS)

    def __call__(
        self, x_ITC: jax.Array, ctx: ConformerContext, cache: ConformerCache | None
    ) -> LayerOutput:
        """The stream after this layer; without a cache, that of whole clips."""
        numerics, bound = ctx.runtime.numerics, self.cfg.clip
        empty = ConformerCache.empty(self.cfg, len(x_ITC), x_ITC.dtype)
        old = empty if cache is None else cache.of_layer()
        with jax.named_scope("ffn_start"):
            x_ITC = self.ffn_start(x_ITC, ctx.runtime)
        with jax.named_scope("attention"):
            y_ITC = self.pre_attn_norm(clip(x_ITC, bound), numerics)
            y_ITC, k_ISNH, v_ISNH = self.attn(y_ITC, ctx.span, old)
            x_ITC += self.post_attn_norm(clip(y_ITC, bound), numerics)
        with jax.named_scope("convolution"):
            # What is no frame of the clip must be zero there, as what lies before its first.
            x_ITC, conv_IXZ = self.conv(ctx.span.cut(x_ITC), ctx.runtime, old.conv_IXZ)
        with jax.named_scope("ffn_end"):
            x_ITC = self.ffn_end(x_ITC, ctx.runtime)
        x_ITC = self.norm(clip(x_ITC, bound), numerics)
        new = ConformerCache(k_ISNH=k_ISNH, v_ISNH=v_ISNH, conv_IXZ=conv_IXZ)
        cache = None if cache is None else cache.put(new)
        return LayerOutput(x=x_ITC, cache=cache, captured={"layer_outputs": x_ITC})


def clip(x: jax.Array, bound: float) -> jax.Array:
    """Into `[-bound, bound]`."""
    return jnp.clip(x, -bound, bound)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ConformerState:
    """What the tower keeps of the pieces of clips before.

    Attributes:
      next_I: int32; index of the mel frame that comes next.
      convs: Of the convolutions in front.
      layers: Of the layers, in their groups.
    """

    next_I: jax.Array
    convs: tuple[ConvState, ...]
    layers: Caches

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self))


class Conformer(nnx.Module):
    """Log-mel `[I, T, M]` to `[I, T / 16, C]`."""

    def __init__(self, cfg: AudioConfig, *, rngs: nnx.Rngs, layout: Layout):
        self.cfg = cfg
        self.layer_groups = group_layers((cfg,) * cfg.num_layers, layout)
        self.subsample = Subsampling(cfg, rngs=rngs)
        self.blocks = stack_layers(
            lambda spec, r: ConformerBlock(spec, rngs=r), self.layer_groups, rngs
        )

    def __call__(
        self,
        mel_ITM: jax.Array,
        length_I: jax.Array,
        runtime: Runtime,
        capture: frozenset[str] = frozenset(),
        state: ConformerState | None = None,
    ) -> tuple[jax.Array, ConformerState | None, dict[str, jax.Array]]:
        """The result, zero where there is no frame; the state after it; what `capture` names.

        Args:
          mel_ITM: The clips, or the next frames of each.
          length_I: int32; frames of each clip.
          state: Of the pieces before; `None` if `mel_ITM` is all that there is of the clips. The
            pieces of a clip end where tokens are complete (`streaming.first_frame`).
        """
        first_I = jnp.zeros_like(length_I) if state is None else state.next_I
        x_ITC, span, convs = self.subsample(
            mel_ITM, Span(first_I, length_I), None if state is None else state.convs
        )
        captured = {"subsample": x_ITC} if "subsample" in capture else {}
        ctx = ConformerContext(span=span, runtime=runtime, capture=capture)
        out = run_layers(
            self.blocks, self.layer_groups, x_ITC, ctx, None if state is None else state.layers
        )
        step = self.cfg.reduction
        # A piece ends with the frame that is kept.
        x_ITC = span.cut(out.x)[:, 0 if state is None else step - 1 :: step]
        if state is not None:
            next_I = first_I + mel_ITM.shape[1]
            state = ConformerState(next_I=next_I, convs=convs, layers=out.cache)
        return x_ITC, state, captured | out.captured
