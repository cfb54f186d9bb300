"""The front of the audio tower: two convolutions that leave a quarter of the frames.

x = relu(norm(conv(x)))   twice: windows over time and mel bands, stride 2 in both
project(all bands and channels of a frame)

A window begins at its frame and looks ahead. The norm is cumulative: a frame is normalised by the
mean and variance of all values up to it (hf `Gemma3nAudioSubSampleConvProjection`).

What lies beyond the end of a clip counts as zero in front of every convolution, as if the clip were
alone: transformers does the same for a clip alone, and lets it see the padding of a batch.

A clip may come in pieces. Then in front of each lie the last frames of the one before
(`ConvState`), and nothing is put behind: a result is there as soon as its window is full.

Local letters: I clips; M mel bands, and what is left of them; U channels that go in; E channels
that come out; Y frames of a window; X bands of a window; C width of the tower.
"""

from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
from flax import nnx

from gemma_jax.encoder_config import AudioConfig
from gemma_jax.nn.einsum import Einsum

STRIDE = 2  # of each convolution, in time and band


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Span:
    """Which frames of their clips the entries of an array are.

    Attributes:
      first_I: int32; index of the first entry in its clip; negative ones are before it.
      length_I: int32; frames of the clip.
    """

    first_I: jax.Array
    length_I: jax.Array

    def index(self, count: int) -> jax.Array:
        """Of so many entries, `[I, count]`."""
        return self.first_I[:, None] + jnp.arange(count, dtype=jnp.int32)

    def inside(self, count: int) -> jax.Array:
        """Which of so many entries are frames of their clips; bool `[I, count]`."""
        index = self.index(count)
        return (index >= 0) & (index < self.length_I[:, None])

    def cut(self, x: jax.Array) -> jax.Array:
        """`x [I, T, ...]` with zeros in the place of what is no frame of its clip."""
        inside = self.inside(x.shape[1])
        return jnp.where(inside.reshape(inside.shape + (1,) * (x.ndim - 2)), x, 0)

    def before(self, count: int) -> "Span":
        """That of an array with so many entries more in front."""
        return Span(self.first_I - count, self.length_I)

    def reduced(self, factor: int) -> "Span":
        """That of every so manieth entry, beginning with the first."""
        return Span(self.first_I // factor, -(-self.length_I // factor))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ConvState:
    """What a convolution and its norm keep of the pieces of a clip before.

    Attributes:
      rows_IYMU: The last frames that went in, as many as a window has more than its stride.
      sum_I: float32; of all values that came out.
      squares_I: float32; sum of their squared distances, each from the mean up to its frame.
    """

    rows_IYMU: jax.Array
    sum_I: jax.Array
    squares_I: jax.Array

    @classmethod
    def empty(cls, clips: int, kernel: int, bands: int, channels: int, dtype) -> "ConvState":
        """That of clips which are about to begin."""
        rows_IYMU = jnp.zeros((clips, kernel - STRIDE, bands, channels), dtype)
        return cls(rows_IYMU, jnp.zeros(clips, jnp.float32), jnp.zeros(clips, jnp.float32))


class CumulativeNorm(nnx.Module):
    """Normalises each frame by the values up to it, of all bands and channels, in float32."""

    def __init__(self, channels: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(channels), dims="E")

    def __call__(
        self, x_ITME: jax.Array, span: Span, sum_I: jax.Array, squares_I: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The frames normalised, and both sums (see `ConvState`) after them."""
        _, T, M, E = x_ITME.shape
        wide_ITME = x_ITME.astype(jnp.float32)
        inside_IT = span.inside(T)
        count_IT = jnp.maximum(span.index(T) + 1, 1).astype(jnp.float32) * (M * E)

        def up_to(before_I, values_IT):
            return before_I[:, None] + jnp.cumsum(jnp.where(inside_IT, values_IT, 0), axis=1)

        sum_IT = up_to(sum_I, wide_ITME.sum((2, 3)))
        wide_ITME -= (sum_IT / count_IT)[:, :, None, None]
        squares_IT = up_to(squares_I, jnp.square(wide_ITME).sum((2, 3)))
        factor_IT = jax.lax.rsqrt(squares_IT / count_IT + self.eps)
        y_ITME = wide_ITME * factor_IT[:, :, None, None] * self.scale[...].astype(jnp.float32)
        ends = (a[:, -1] if T else old for a, old in ((sum_IT, sum_I), (squares_IT, squares_I)))
        return y_ITME.astype(x_ITME.dtype), *ends


class SubsamplingConv(nnx.Module):
    """One of the two convolutions, with its norm."""

    def __init__(self, cfg: AudioConfig, channels: tuple[int, int], *, rngs: nnx.Rngs):
        self.kernel = cfg.conv_kernel
        U, E = channels
        sizes = {"U": U, "E": E, "Y": self.kernel, "X": self.kernel}
        self.conv = Einsum("ITMUYX,EUYX->ITME", sizes, rngs=rngs)
        self.norm = CumulativeNorm(E, cfg.conv_norm_eps)

    def __call__(
        self, x_ITMU: jax.Array, span: Span, old: ConvState | None
    ) -> tuple[jax.Array, Span, ConvState]:
        """`[I, T, M, U]` to about half of `T` and of `M`.

        Args:
          old: Of the piece before; `None` if `x_ITMU` is all that there is of the clips.
        """
        I, _, M, U = x_ITMU.shape
        x_ITMU = span.cut(x_ITMU)
        if old is None:
            old = ConvState.empty(I, self.kernel, M, U, x_ITMU.dtype)
            x_ITMU = jnp.pad(x_ITMU, ((0, 0), (0, self.kernel - 1), (0, 0), (0, 0)))
        else:
            x_ITMU = jnp.concatenate([old.rows_IYMU, x_ITMU], axis=1)
            span = span.before(self.kernel - STRIDE)
        y_ITME = self.conv(self._windows(x_ITMU))
        span = span.reduced(STRIDE)
        y_ITME, *sums = self.norm(y_ITME, span, old.sum_I, old.squares_I)
        rows_IYMU = x_ITMU[:, x_ITMU.shape[1] - (self.kernel - STRIDE) :]
        return jax.nn.relu(y_ITME), span, ConvState(rows_IYMU, *sums)

    def _windows(self, x_ITMU: jax.Array) -> jax.Array:
        """All of them that fit, `[I, T, M, U, Y, X]`; one band of zeros lies on either side."""
        x_ITMU = jnp.pad(x_ITMU, ((0, 0), (0, 0), (1, 1), (0, 0)))
        T, M = ((size - self.kernel) // STRIDE + 1 for size in x_ITMU.shape[1:3])

        def at(y: int, x: int) -> jax.Array:
            return x_ITMU[:, y : y + STRIDE * T : STRIDE, x : x + STRIDE * M : STRIDE]

        window = range(self.kernel)
        return jnp.stack([jnp.stack([at(y, x) for x in window], -1) for y in window], -2)


class Subsampling(nnx.Module):
    """Log-mel `[I, T, M]` to `[I, T / 4, C]`."""

    def __init__(self, cfg: AudioConfig, *, rngs: nnx.Rngs):
        channels = (1, *cfg.conv_channels)
        self.convs = nnx.List(
            [SubsamplingConv(cfg, pair, rngs=rngs) for pair in pairwise(channels)]
        )
        sizes = {"M": cfg.bands[-1], "E": channels[-1], "C": cfg.d_tower}
        self.proj = Einsum("ITME,CME->ITC", sizes, rngs=rngs)

    def __call__(
        self, mel_ITM: jax.Array, span: Span, states: tuple[ConvState, ...] | None
    ) -> tuple[jax.Array, Span, tuple[ConvState, ...]]:
        """What is no frame of its clip is zero, here too."""
        x_ITMU, news = mel_ITM[:, :, :, None], []
        for conv, old in zip(self.convs, states or (None, None)):
            x_ITMU, span, new = conv(x_ITMU, span, old)
            news.append(new)
        return span.cut(self.proj(x_ITMU)), span, tuple(news)
