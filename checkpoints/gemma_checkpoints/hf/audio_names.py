"""Tensor names of Gemma 3n's audio tower (`modeling_gemma3n.py`), from inside `audio_tower.`.

What transformers has put in front of it: published files `model.audio_tower.`, files of the tower
alone nothing.
"""

from ..name_table import Row, Table

TOWER = "audio_tower."
_OURS, _THEIRS = "audio.tower.blocks.{i}.", TOWER + "conformer.{i}."
_ATTN, _CONV = _THEIRS + "attention.", _THEIRS + "lconv1d."
_HEADS = "(N H) C -> N H C"


def _conv(i: int) -> Table:
    """One of the two convolutions in front."""
    ours, theirs = (
        f"audio.tower.subsample.convs.{i}.",
        f"{TOWER}subsample_conv_projection.conv_{i}.",
    )
    return (
        Row(ours + "conv.w", theirs + "conv.weight"),
        Row(ours + "norm.scale", theirs + "norm.weight"),
    )


def _ffn(ours: str, theirs: str) -> Table:
    """One of the two feed-forward networks of a layer."""
    ours, theirs = _OURS + ours + ".", _THEIRS + theirs + "."
    return (
        Row(ours + "pre_norm.scale", theirs + "pre_layer_norm.weight"),
        Row(ours + "up.w", theirs + "ffw_layer_1.weight"),
        Row(ours + "down.w", theirs + "ffw_layer_2.weight"),
        Row(ours + "post_norm.scale", theirs + "post_layer_norm.weight"),
    )


AUDIO: Table = (
    *_conv(0),
    *_conv(1),
    Row(
        "audio.tower.subsample.proj.w",
        TOWER + "subsample_conv_projection.input_proj_linear.weight",
        "C (M E) -> C M E",
    ),
    *_ffn("ffn_start", "ffw_layer_start"),
    Row(_OURS + "pre_attn_norm.scale", _ATTN + "pre_attn_norm.weight"),
    Row(_OURS + "attn.q.w", _ATTN + "attn.q_proj.weight", _HEADS),
    Row(_OURS + "attn.k.w", _ATTN + "attn.k_proj.weight", _HEADS),
    Row(_OURS + "attn.v.w", _ATTN + "attn.v_proj.weight", _HEADS),
    Row(_OURS + "attn.o.w", _ATTN + "post.weight", "C (N H) -> C N H"),
    Row(
        _OURS + "attn.distance.w",
        _ATTN + "attn.relative_position_embedding.pos_proj.weight",
        _HEADS,
    ),
    Row(_OURS + "attn.query_scale", _ATTN + "attn.per_dim_scale"),
    Row(_OURS + "post_attn_norm.scale", _ATTN + "post_norm.weight"),
    Row(_OURS + "conv.pre_norm.scale", _CONV + "pre_layer_norm.weight"),
    Row(_OURS + "conv.start.w", _CONV + "linear_start.weight", "(W Z) C -> W Z C"),
    Row(_OURS + "conv.depthwise", _CONV + "depthwise_conv1d.weight"),
    Row(_OURS + "conv.norm.scale", _CONV + "conv_norm.weight"),
    Row(_OURS + "conv.end.w", _CONV + "linear_end.weight"),
    *_ffn("ffn_end", "ffw_layer_end"),
    Row(_OURS + "norm.scale", _THEIRS + "norm.weight"),
)
