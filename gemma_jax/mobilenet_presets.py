"""The vision tower of Gemma 3n as data: MobileNetV5-300M (timm `mobilenetv5_300m_enc`)."""

from gemma_jax.encoder_config import AttentionBlock, FusedBlock, InvertedBlock, MobileNetConfig


def _attending(
    channels: int, num_heads: int, head_dim: int, kv_stride: int, times: int
) -> tuple[AttentionBlock | InvertedBlock, ...]:
    """Attention and a feed-forward without windows, in turns."""
    attention = AttentionBlock(
        channels=channels, num_heads=num_heads, head_dim=head_dim, kv_stride=kv_stride
    )
    return (attention, InvertedBlock(channels=channels, expansion=2)) * times


MOBILENET_V5_300M = MobileNetConfig(
    d_tower=2_048,
    d_stem=64,
    stages=(
        (
            FusedBlock(channels=128, stride=2),
            *(FusedBlock(channels=128),) * 2,
        ),
        (
            InvertedBlock(channels=256, start_kernel=3, middle_kernel=5, stride=2, expansion=6),
            *(
                InvertedBlock(channels=256, start_kernel=5),
                InvertedBlock(channels=256, start_kernel=3),
            )
            * 2,
        ),
        (
            InvertedBlock(channels=640, start_kernel=5, middle_kernel=5, stride=2, expansion=6),
            *(InvertedBlock(channels=640, start_kernel=5),) * 7,
            InvertedBlock(channels=640, expansion=1),
            *_attending(640, num_heads=12, head_dim=64, kv_stride=2, times=14),
        ),
        (
            InvertedBlock(channels=1_280, start_kernel=5, middle_kernel=5, stride=2, expansion=6),
            *_attending(1_280, num_heads=16, head_dim=96, kv_stride=1, times=19),
        ),
    ),
    image_size=768,
    num_soft_tokens=256,
    image_token=262_145,
    start_token=255_999,
    end_token=262_144,
)
