"""What the towers are made of that read images and sounds, and how their inputs are prepared."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from gemma_jax.field_types import check_positive, check_types


@dataclass(frozen=True, kw_only=True)
class ImageProcessing:
    """Says how a picture becomes what a tower reads; the defaults are those of published models.

    Attributes:
      rescale: Factor from levels in [0, 255] to values.
      mean, std: Per channel: values become `(value - mean) / std`.
      resample: Name of the filter that resizes, as in Pillow.
      pan_and_scan: Whether elongated pictures are cropped, unless told otherwise.
      min_crop_size, max_num_crops, min_ratio: See `gemma_jax.vision.pan_and_scan.PanAndScan`.
    """

    rescale: float = 1 / 255
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    resample: str = "bilinear"
    pan_and_scan: bool = False
    min_crop_size: int = 256
    max_num_crops: int = 4
    min_ratio: float = 1.2

    def __post_init__(self):
        check_types(self)
        check_positive(self, "rescale", "min_crop_size", "max_num_crops", "min_ratio")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(one > 0 for one in self.std):
            raise ValueError(f"mean={self.mean} and std={self.std} must be three numbers each")
        if self.resample not in RESAMPLING:
            raise ValueError(f"resample={self.resample!r} must be one of {', '.join(RESAMPLING)}")


RESAMPLING = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The SigLIP tower that reads images, and how its result enters the text.

    Attributes:
      d_tower, d_ff, num_layers, num_heads: C, F, layers and N of the tower.
      image_size, patch_size: Side of the square image and of a patch, in pixels.
      num_soft_tokens: Tokens an image takes in the text, after pooling; a square number.
      image_token, start_token, end_token: Ids of the soft-token placeholder and of what stands
        before and after a run of them.
      norm_eps: Added to the variance in LayerNorm, and to the mean square in the projector's norm.
      images: How pictures are prepared.
    """

    d_tower: int
    d_ff: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    num_soft_tokens: int
    image_token: int
    start_token: int
    end_token: int
    norm_eps: float = 1e-6
    images: ImageProcessing = field(default_factory=ImageProcessing)

    def __post_init__(self):
        check_types(self)
        check_positive(
            self, "d_tower", "d_ff", "num_layers", "num_heads", "image_size", "patch_size",
            "num_soft_tokens", "norm_eps",
        )  # fmt: skip
        if self.d_tower % self.num_heads:
            raise ValueError(
                f"d_tower={self.d_tower} must be a multiple of num_heads={self.num_heads}"
            )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}"
            )
        if math.isqrt(self.num_soft_tokens) ** 2 != self.num_soft_tokens or self.grid % self.pooled:
            raise ValueError(
                f"num_soft_tokens={self.num_soft_tokens} must be a square whose side divides the "
                f"{self.grid} patches along an image's side"
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def pooled(self) -> int:
        """Soft tokens along one side."""
        return math.isqrt(self.num_soft_tokens)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Dimension letter -> size, inside the tower."""
        return {
            "C": self.d_tower,
            "F": self.d_ff,
            "N": self.num_heads,
            "K": self.num_heads,
            "H": self.d_tower // self.num_heads,
            "Q": self.grid**2,
            "U": 3,
            "Y": self.patch_size,
            "X": self.patch_size,
            "L": self.num_layers,
        }


def divisible_channels(channels: float) -> int:
    """The nearest multiple of 8, or the next one if that is less than nine tenths."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest


@dataclass(frozen=True, kw_only=True)
class FusedBlock:
    """A fused inverted residual of MobileNetV5 (timm `er`): convolution, then 1x1 to `channels`.

    Attributes:
      channels: Channels of the result.
      kernel: Side of the convolution's window.
      stride: Of that convolution.
      expansion: Channels between the two, as a multiple of the input's.
    """

    channels: int
    kernel: int = 3
    stride: int = 1
    expansion: float = 4.0

    def __post_init__(self):
        check_types(self)
        check_positive(self, "channels", "kernel", "stride", "expansion")

    def inner(self, channels: int) -> int:
        """Channels between the two, where so many come in."""
        return divisible_channels(channels * self.expansion)


@dataclass(frozen=True, kw_only=True)
class InvertedBlock:
    """A universal inverted bottleneck (timm `uir`): depthwise, 1x1, depthwise, 1x1.

    Attributes:
      channels: Channels of the result.
      start_kernel, middle_kernel: Sides of the depthwise windows before and after the expansion; 0
        leaves one out.
      stride: Of the depthwise convolution in the middle, or of the first where there is no other.
      expansion: Channels in the middle, as a multiple of the input's.
    """

    channels: int
    start_kernel: int = 0
    middle_kernel: int = 0
    stride: int = 1
    expansion: float = 4.0

    def __post_init__(self):
        check_types(self)
        check_positive(self, "channels", "stride", "expansion")
        if self.start_kernel < 0 or self.middle_kernel < 0:
            raise ValueError(
                f"start_kernel={self.start_kernel} and middle_kernel={self.middle_kernel} must be "
                "0 or positive"
            )
        if self.stride > 1 and not (self.start_kernel or self.middle_kernel):
            raise ValueError(f"stride={self.stride} needs a start_kernel or a middle_kernel")

    def inner(self, channels: int) -> int:
        """Channels in the middle, where so many come in."""
        return divisible_channels(channels * self.expansion)


@dataclass(frozen=True, kw_only=True)
class AttentionBlock:
    """Multi-query attention over the places of a map (timm `mqa`).

    Attributes:
      channels: Channels of the input and of the result.
      num_heads, head_dim: N and H; keys and values have one head.
      kv_stride: Keys and values come from a map that is smaller by this factor along each side.
      kv_kernel: Side of the depthwise window that makes it smaller.
    """

    channels: int
    num_heads: int
    head_dim: int
    kv_stride: int = 1
    kv_kernel: int = 3

    def __post_init__(self):
        check_types(self)
        check_positive(self, "channels", "num_heads", "head_dim", "kv_stride", "kv_kernel")

    @property
    def stride(self) -> int:
        """The result is as large as the input."""
        return 1


MobileNetBlock = FusedBlock | InvertedBlock | AttentionBlock
# Levels in [0, 255] become values in [0, 1], and stay so (Gemma 3n).
UNIT_RANGE = ImageProcessing(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@dataclass(frozen=True, kw_only=True)
class MobileNetConfig:
    """Describes a MobileNetV5 that reads images, and how its result enters the text.

    Attributes:
      d_tower: C, channels of the result.
      d_stem: Channels after the first convolution.
      stages: The blocks of each stage. The results of the last two stages are fused.
      image_size: Side of the square image, in pixels; others of the same network are legal.
      num_soft_tokens: Tokens an image takes in the text; a square number.
      image_token, start_token, end_token: Ids of the soft-token placeholder and of what stands
        before and after a run of them.
      fusion_expansion: Channels in the middle of the fusion, as a multiple of those of both stages.
      norm_eps: Added to the mean square in every norm.
      images: How pictures are prepared.
    """

    d_tower: int
    d_stem: int
    stages: tuple[tuple[MobileNetBlock, ...], ...]
    image_size: int
    num_soft_tokens: int
    image_token: int
    start_token: int
    end_token: int
    fusion_expansion: float = 2.0
    norm_eps: float = 1e-6
    images: ImageProcessing = UNIT_RANGE

    def __post_init__(self):
        check_types(self)
        check_positive(
            self, "d_tower", "d_stem", "image_size", "num_soft_tokens", "fusion_expansion",
            "norm_eps",
        )  # fmt: skip
        if len(self.stages) < 2 or not all(self.stages):
            raise ValueError("stages must hold at least two, of at least one block each")
        if self.pooled**2 != self.num_soft_tokens:
            raise ValueError(f"num_soft_tokens={self.num_soft_tokens} must be a square")
        if self.image_size % self.stride:
            raise ValueError(
                f"image_size={self.image_size} must be a multiple of {self.stride}, the strides of "
                "all stages together"
            )
        channels = self.d_stem
        for block in (block for stage in self.stages for block in stage):
            if isinstance(block, AttentionBlock) and block.channels != channels:
                raise ValueError(f"{block} must have the {channels} channels that come in")
            channels = block.channels

    @property
    def pooled(self) -> int:
        """Soft tokens along one side."""
        return math.isqrt(self.num_soft_tokens)

    @property
    def stride(self) -> int:
        """Pixels along a side of the image for one place of the last stage."""
        return 2 * math.prod(block.stride for stage in self.stages for block in stage)

    def fusion_inner(self, channels: int) -> int:
        """Channels in the middle of the fusion, where so many come in."""
        return divisible_channels(channels * self.fusion_expansion)


@dataclass(frozen=True, kw_only=True)
class SoundProcessing:
    """Says how a waveform becomes what an audio tower reads; the defaults are Gemma 3n's.

    Attributes:
      sampling_rate: Samples per second.
      frame_length, hop_length: Of the short-time spectrum, in samples.
      fft_length: Points of the Fourier transform.
      min_frequency, max_frequency: Of the mel filters, in Hz.
      preemphasis: Share of the sample before that is taken off each sample of a frame.
      mel_floor: Smallest magnitude before the logarithm.
      max_samples: Longest clip that is read as one, in samples.
      pad_multiple: Clips are filled up with silence to a multiple of so many samples.
    """

    sampling_rate: int = 16_000
    frame_length: int = 512
    hop_length: int = 160
    fft_length: int = 1_024
    min_frequency: float = 125.0
    max_frequency: float = 7_600.0
    preemphasis: float = 0.97
    mel_floor: float = 1e-5
    max_samples: int = 480_000
    pad_multiple: int = 128

    def __post_init__(self):
        check_types(self)
        check_positive(
            self, "sampling_rate", "frame_length", "hop_length", "fft_length", "min_frequency",
            "max_frequency", "mel_floor", "max_samples", "pad_multiple",
        )  # fmt: skip
        if self.fft_length < self.frame_length:
            raise ValueError(
                f"fft_length={self.fft_length} must be at least frame_length={self.frame_length}"
            )
        if not self.min_frequency < self.max_frequency <= self.sampling_rate / 2:
            raise ValueError(
                f"min_frequency={self.min_frequency} and max_frequency={self.max_frequency} must "
                f"ascend, up to half of sampling_rate={self.sampling_rate}"
            )


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """Describes the USM conformer that hears, and how its result enters the text.

    Attributes:
      d_tower, num_layers, num_heads: C, layers and N of the tower.
      num_mels: Mel bands of its input.
      conv_channels: Channels of the two convolutions in front, each of stride 2 in time and band.
      conv_kernel: Side of their windows.
      conv_norm_eps: Added to the variance in their norms.
      left_context: Frames that a frame attends to, itself included.
      score_cap: `cap * tanh(x / cap)` on attention scores.
      depthwise_kernel: Frames that the causal convolution of a block sees, itself included.
      residual_weight: Share of a feed-forward network that is added to the stream.
      clip: Bound on values at the places where the tower clamps them.
      reduction: Of so many frames after the blocks one becomes a soft token.
      norm_eps: Added to the mean square in the norms of the convolutions; in all others it is 1e-6
        (hf reads its `rms_norm_eps` there alone).
      num_soft_tokens: Tokens a clip takes in the text; shorter ones are filled up.
      audio_token, start_token, end_token: Ids of the soft-token placeholder and of what stands
        before and after a run of them.
      sounds: How waveforms are prepared.
    """

    d_tower: int
    num_layers: int
    num_heads: int
    num_mels: int
    conv_channels: tuple[int, ...] = (128, 32)
    conv_kernel: int = 3
    conv_norm_eps: float = 1e-3
    left_context: int = 13
    score_cap: float = 50.0
    depthwise_kernel: int = 5
    residual_weight: float = 0.5
    clip: float = 1e10
    reduction: int = 4
    norm_eps: float = 1e-6
    num_soft_tokens: int = 188
    audio_token: int
    start_token: int
    end_token: int
    sounds: SoundProcessing = field(default_factory=SoundProcessing)

    def __post_init__(self):
        check_types(self)
        check_positive(
            self, "d_tower", "num_layers", "num_heads", "num_mels", "conv_kernel", "conv_norm_eps",
            "left_context", "score_cap", "depthwise_kernel", "residual_weight", "clip", "reduction",
            "norm_eps", "num_soft_tokens",
        )  # fmt: skip
        if self.conv_kernel < 2:
            raise ValueError(f"conv_kernel={self.conv_kernel} must be at least the stride, 2")
        if len(self.conv_channels) != 2 or not all(one > 0 for one in self.conv_channels):
            raise ValueError(f"conv_channels={self.conv_channels} must be two positive numbers")
        if self.bands[-1] < 1:
            raise ValueError(
                f"num_mels={self.num_mels} are too few for conv_kernel={self.conv_kernel}"
            )
        if self.d_tower % self.num_heads or self.d_tower % 2:
            raise ValueError(
                f"d_tower={self.d_tower} must be even and a multiple of num_heads={self.num_heads}"
            )

    @property
    def scale_plus_one(self) -> bool:
        """Norms multiply by their scales as they are; see `GemmaConfig`."""
        return False

    @property
    def bands(self) -> tuple[int, ...]:
        """Mel bands, and what each convolution leaves of them."""
        counts = [self.num_mels]
        for _ in self.conv_channels:
            counts.append((counts[-1] + 2 - self.conv_kernel) // 2 + 1)
        return tuple(counts)

    @property
    def sizes(self) -> Mapping[str, int]:
        """Dimension letter -> size, inside the tower."""
        return {
            "C": self.d_tower,
            "F": 4 * self.d_tower,
            "N": self.num_heads,
            "K": self.num_heads,
            "H": self.d_tower // self.num_heads,
            "M": self.num_mels,
            "L": self.num_layers,
        }
