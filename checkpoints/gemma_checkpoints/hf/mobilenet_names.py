"""Tensor names of MobileNetV5 inside timm's model, and what ours are called."""

from gemma_jax.encoder_config import (
    AttentionBlock,
    FusedBlock,
    InvertedBlock,
    MobileNetBlock,
    MobileNetConfig,
)

from ..name_table import Row, Table

# Convolutions of 1 x 1 are matrices.
POINTWISE_PAIR: Table = (
    Row("expand.w", "pw_exp.conv.weight", "M C 1 1 -> M C"),
    Row("expand_norm.scale", "pw_exp.bn.weight"),
    Row("project.w", "pw_proj.conv.weight", "E M 1 1 -> E M"),
    Row("project_norm.scale", "pw_proj.bn.weight"),
)
FUSED: Table = (
    Row("expand.w", "conv_exp.weight"),
    Row("expand_norm.scale", "bn1.weight"),
    Row("project.w", "conv_pwl.weight", "E M 1 1 -> E M"),
    Row("project_norm.scale", "bn2.weight"),
)
START: Table = (
    Row("start.w", "dw_start.conv.weight", "C 1 U W -> C U W"),
    Row("start.norm.scale", "dw_start.bn.weight"),
)
MIDDLE: Table = (
    Row("middle.w", "dw_mid.conv.weight", "M 1 U W -> M U W"),
    Row("middle.norm.scale", "dw_mid.bn.weight"),
)
LAYER_SCALE = Row("layer_scale", "layer_scale.gamma")
ATTENTION: Table = (
    Row("norm.scale", "norm.weight"),
    Row("attn.q.w", "attn.query.proj.weight", "(Z H) C 1 1 -> Z H C"),
    Row("attn.k.w", "attn.key.proj.weight", "(K H) C 1 1 -> K H C"),
    Row("attn.v.w", "attn.value.proj.weight", "(K H) C 1 1 -> K H C"),
    Row("attn.o.w", "attn.output.proj.weight", "C (Z H) 1 1 -> C Z H"),
    LAYER_SCALE,
)
SMALLER_KEYS_VALUES: Table = (
    Row("attn.k_down.w", "attn.key.down_conv.weight", "C 1 U W -> C U W"),
    Row("attn.k_down.norm.scale", "attn.key.norm.weight"),
    Row("attn.v_down.w", "attn.value.down_conv.weight", "C 1 U W -> C U W"),
    Row("attn.v_down.norm.scale", "attn.value.norm.weight"),
)
STEM: Table = (
    Row("conv.w", "conv.weight"),
    Row("conv.bias", "conv.bias"),
    Row("norm.scale", "bn.weight"),
)


def mobilenet_rows(vision: MobileNetConfig, ours: str = "vision.", theirs: str = "") -> Table:
    """One row for every parameter of the tower.

    Args:
      vision: Says which blocks there are.
      ours, theirs: What stands in front of the names.
    """
    parts = [("stem", "conv_stem", STEM), ("fusion", "msfa.ffn", POINTWISE_PAIR)]
    parts.append(("fusion", "msfa", (Row("norm.scale", "norm.weight"),)))
    for s, blocks in enumerate(vision.stages):
        for b, block in enumerate(blocks):
            parts.append((f"stages.{s}.{b}", f"blocks.{s}.{b}", _block(block)))
    return tuple(
        Row(f"{ours}{our}.{row.ours}", f"{theirs}{their}.{row.theirs}", row.rearrange)
        for our, their, rows in parts
        for row in rows
    )


def _block(block: MobileNetBlock) -> Table:
    if isinstance(block, FusedBlock):
        return FUSED
    if isinstance(block, InvertedBlock):
        start = START if block.start_kernel else ()
        middle = MIDDLE if block.middle_kernel else ()
        return (*start, *POINTWISE_PAIR, *middle, LAYER_SCALE)
    if isinstance(block, AttentionBlock):
        return ATTENTION + (SMALLER_KEYS_VALUES if block.kv_stride > 1 else ())
    raise TypeError(f"no tensor names for {type(block).__name__}")
