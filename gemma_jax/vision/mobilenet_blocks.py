"""The blocks of MobileNetV5, each from its config: maps of vectors to maps of vectors.

Maps have channels last, as matrices of a product want them. Norms stay in the dtype of the
activations, as in timm (`models/_efficientnet_blocks.py`, `layers/attention2d.py`, `RmsNorm2d`).

Local letters: I images; Y rows of a map; X columns of a map; C channels that come in; E channels
that go out; M channels in between; U rows of a window; W columns of a window; Z heads, which no
mesh splits: the published twelve divide by few. K and H are the tower's own; K is 1. T and S are
places of a map.
"""

from functools import singledispatch

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.encoder_config import AttentionBlock, FusedBlock, InvertedBlock, MobileNetBlock
from gemma_jax.nn.activations import ACTIVATIONS
from gemma_jax.nn.einsum import Einsum
from gemma_jax.runtime import Runtime
from gemma_jax.weights.contract import HIGHEST
from gemma_kernels.attention import AttentionSpec, attention


def gelu(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation, in float32 as torch computes it."""
    return ACTIVATIONS["gelu_tanh"](x.astype(jnp.float32)).astype(x.dtype)


class ChannelNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the channels, in the dtype of `x`."""

    def __init__(self, letter: str, size: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(size), dims=letter)

    def __call__(self, x: jax.Array) -> jax.Array:
        unit = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return unit * self.scale[...].astype(x.dtype)


class Conv(nnx.Module):
    """A convolution over all channels; the result has one place for every `stride` squared."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        stride: int,
        *,
        bias: bool = False,
        out: str = "E",
        rngs: nnx.Rngs,
    ):
        shape = (channels_out, channels_in, kernel, kernel)
        fan_in = channels_in * kernel**2
        self.stride = stride
        self.w = nnx.Param(rngs.normal(shape) * fan_in**-0.5, dims=out + "CUW")
        self.bias = nnx.Param(jnp.zeros(channels_out), dims=out) if bias else None

    def __call__(self, x_IYXC: jax.Array) -> jax.Array:
        y_IYXE = jax.lax.conv_general_dilated(
            x_IYXC,
            self.w[...].astype(x_IYXC.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "OIHW", "NHWC"),
            precision=HIGHEST,
        )
        return y_IYXE if self.bias is None else y_IYXE + self.bias[...].astype(y_IYXE.dtype)


class Depthwise(nnx.Module):
    """A convolution of each channel by itself, and a norm.

    It is a sum over the places of the window, which XLA makes one loop of: on CPUs that is 7 to 20
    times as fast as its grouped convolution. It sums in float32, and rounds once.
    """

    def __init__(
        self, letter: str, channels: int, kernel: int, stride: int, eps: float, *, rngs: nnx.Rngs
    ):
        self.stride = stride
        w = rngs.normal((channels, kernel, kernel)) / kernel
        self.w = nnx.Param(w, dims=letter + "UW")
        self.norm = ChannelNorm(letter, channels, eps)

    def __call__(self, x_IYXC: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(x_IYXC.dtype, jnp.float32)
        w_CUW = self.w[...].astype(x_IYXC.dtype).astype(dtype)
        _, U, W = w_CUW.shape
        I, height, width, C = x_IYXC.shape
        rows, end_Y = _same(height, U, self.stride)
        columns, end_X = _same(width, W, self.stride)
        padded_IYXC = jnp.pad(x_IYXC.astype(dtype), ((0, 0), rows, columns, (0, 0)))
        steps = (1, self.stride, self.stride, 1)

        def seen(u: int, w: int) -> jax.Array:
            """What one place of the window sees, for every place of the result."""
            return jax.lax.slice(padded_IYXC, (0, u, w, 0), (I, u + end_Y, w + end_X, C), steps)

        y_IYXC = sum(seen(u, w) * w_CUW[:, u, w] for u in range(U) for w in range(W))
        return self.norm(y_IYXC.astype(x_IYXC.dtype))


def _same(size: int, kernel: int, stride: int) -> tuple[tuple[int, int], int]:
    """Padding before and behind an axis as in TensorFlow, and the end of where windows begin."""
    end = (size - 1) // stride * stride + 1
    missing = max(end - 1 + kernel - size, 0)
    return (missing // 2, missing - missing // 2), end


class Fused(nnx.Module):
    """`norm(project(gelu(norm(conv x))))`, plus `x` if the shapes agree (timm `EdgeResidual`)."""

    def __init__(self, block: FusedBlock, channels: int, eps: float, *, rngs: nnx.Rngs):
        inner = block.inner(channels)
        self.residual = block.stride == 1 and block.channels == channels
        self.expand = Conv(channels, inner, block.kernel, block.stride, out="M", rngs=rngs)
        self.expand_norm = ChannelNorm("M", inner, eps)
        self.project = Einsum("IYXM,EM->IYXE", {"M": inner, "E": block.channels}, rngs=rngs)
        self.project_norm = ChannelNorm("E", block.channels, eps)

    def __call__(self, x_IYXC: jax.Array, runtime: Runtime) -> jax.Array:
        y_IYXM = gelu(self.expand_norm(self.expand(x_IYXC)))
        y_IYXE = self.project_norm(self.project(y_IYXM))
        return x_IYXC + y_IYXE if self.residual else y_IYXE


class PointwisePair(nnx.Module):
    """`norm(project(middle(gelu(norm(expand x)))))`: what every inverted residual is made of."""

    def __init__(self, sizes: dict[str, int], eps: float, *, rngs: nnx.Rngs):
        self.expand = Einsum("IYXC,MC->IYXM", sizes, rngs=rngs)
        self.expand_norm = ChannelNorm("M", sizes["M"], eps)
        self.project = Einsum("IYXM,EM->IYXE", sizes, rngs=rngs)
        self.project_norm = ChannelNorm("E", sizes["E"], eps)

    def widen(self, x_IYXC: jax.Array) -> jax.Array:
        """Into the channels in between."""
        return gelu(self.expand_norm(self.expand(x_IYXC)))

    def narrow(self, x_IYXM: jax.Array) -> jax.Array:
        """Out of them."""
        return self.project_norm(self.project(x_IYXM))

    def __call__(self, x_IYXC: jax.Array) -> jax.Array:
        return self.narrow(self.widen(x_IYXC))


class Inverted(PointwisePair):
    """Depthwise, expansion, depthwise, projection, each with a norm; the first and the third may
    be absent (timm `UniversalInvertedResidual`).
    """

    def __init__(self, block: InvertedBlock, channels: int, eps: float, *, rngs: nnx.Rngs):
        sizes = {"C": channels, "M": block.inner(channels), "E": block.channels}
        super().__init__(sizes, eps, rngs=rngs)
        self.residual = block.stride == 1 and block.channels == channels
        start, middle = block.start_kernel, block.middle_kernel
        stride = 1 if middle else block.stride
        self.start = Depthwise("C", channels, start, stride, eps, rngs=rngs) if start else None
        self.middle = (
            Depthwise("M", sizes["M"], middle, block.stride, eps, rngs=rngs) if middle else None
        )
        self.layer_scale = nnx.Param(jnp.ones(block.channels), dims="E")

    def __call__(self, x_IYXC: jax.Array, runtime: Runtime) -> jax.Array:
        y_IYXC = x_IYXC if self.start is None else self.start(x_IYXC)
        y_IYXM = self.widen(y_IYXC)
        if self.middle is not None:
            y_IYXM = gelu(self.middle(y_IYXM))
        y_IYXE = self.narrow(y_IYXM) * self.layer_scale[...].astype(x_IYXC.dtype)
        return x_IYXC + y_IYXE if self.residual else y_IYXE


class MapAttention(nnx.Module):
    """Every place of a map attends to all places of a smaller one, through one key and value head.

    (timm `MultiQueryAttention2d`)
    """

    def __init__(self, block: AttentionBlock, eps: float, *, rngs: nnx.Rngs):
        channels = block.channels
        sizes = {"C": channels, "Z": block.num_heads, "K": 1, "H": block.head_dim}

        def smaller():
            args = (channels, block.kv_kernel, block.kv_stride, eps)
            return Depthwise("C", *args, rngs=rngs) if block.kv_stride > 1 else None

        self.k_down, self.v_down = smaller(), smaller()
        self.q = Einsum("ITC,ZHC->ITZH", sizes, rngs=rngs)
        self.k = Einsum("ISC,KHC->ISKH", sizes, rngs=rngs)
        self.v = Einsum("ISC,KHC->ISKH", sizes, rngs=rngs)
        self.o = Einsum("ITZH,CZH->ITC", sizes, rngs=rngs)
        self.spec = AttentionSpec(scale=block.head_dim**-0.5, masked=False)

    def __call__(self, x_IYXC: jax.Array, runtime: Runtime) -> jax.Array:
        def attend(q_ITZH, k_ISKH, v_ISKH):
            I, _, _, H = q_ITZH.shape
            # All heads have the same keys, so they are further rows of one product.
            q_ITKH, name = q_ITZH.reshape(I, -1, 1, H), runtime.attention_impl
            out_ITKH = attention(q_ITKH, k_ISKH, v_ISKH, spec=self.spec, implementation=name)
            return out_ITKH.reshape(q_ITZH.shape)

        keys_IYXC = values_IYXC = x_IYXC
        if self.k_down is not None:
            keys_IYXC = self.k_down(x_IYXC)
            values_IYXC = self.v_down(x_IYXC)
        heads = (self.q(_places(x_IYXC)), self.k(_places(keys_IYXC)), self.v(_places(values_IYXC)))
        if (partition := runtime.partition) is None:
            out_ITZH = attend(*heads)
        else:
            out_ITZH = partition.run(
                attend, "ITZH", *zip(("ITZH", "ISKH", "ISKH"), heads), whole="TS"
            )
        return self.o(out_ITZH).reshape(x_IYXC.shape)


def _places(x_IYXC: jax.Array) -> jax.Array:
    """The places of a map in reading order."""
    return x_IYXC.reshape(x_IYXC.shape[0], -1, x_IYXC.shape[-1])


class Attending(nnx.Module):
    """`x + attention(norm(x)) * layer_scale` (timm `MobileAttention`)."""

    def __init__(self, block: AttentionBlock, channels: int, eps: float, *, rngs: nnx.Rngs):
        self.norm = ChannelNorm("C", channels, eps)
        self.attn = MapAttention(block, eps, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.ones(channels), dims="C")

    def __call__(self, x_IYXC: jax.Array, runtime: Runtime) -> jax.Array:
        y_IYXC = self.attn(self.norm(x_IYXC), runtime)
        return x_IYXC + y_IYXC * self.layer_scale[...].astype(x_IYXC.dtype)


@singledispatch
def make_block(block: MobileNetBlock, channels: int, eps: float, *, rngs: nnx.Rngs) -> nnx.Module:
    """The module of a block; it is called with a map `[I, Y, X, C]` and the `Runtime`.

    Args:
      block: What it is.
      channels: C of the map that comes in.
      eps: Added to the mean square in its norms.
    """
    raise TypeError(f"expected a block of a MobileNetConfig, got {type(block).__name__}")


make_block.register(FusedBlock, Fused)
make_block.register(InvertedBlock, Inverted)
make_block.register(AttentionBlock, Attending)
