"""Tensor names of Hugging Face checkpoints (`modeling_gemma{,2,3}.py` of transformers).

Names are written from inside the decoder; the prefix in front of them (`model.` and others) is the
folder's business (`hf.py`).
"""

from gemma_jax.config import GemmaConfig

from .table import Row, Table

_LAYER = "layers.{i}."

CORE: Table = (
    Row("embed.table", "embed_tokens.weight"),
    Row("blocks.{i}.pre_attn_norm.scale", _LAYER + "input_layernorm.weight"),
    Row("blocks.{i}.attn.q.w", _LAYER + "self_attn.q_proj.weight", "(N H) D -> N H D"),
    Row("blocks.{i}.attn.k.w", _LAYER + "self_attn.k_proj.weight", "(K H) D -> K H D"),
    Row("blocks.{i}.attn.v.w", _LAYER + "self_attn.v_proj.weight", "(K H) D -> K H D"),
    Row("blocks.{i}.attn.o.w", _LAYER + "self_attn.o_proj.weight", "D (N H) -> D N H"),
    Row("blocks.{i}.ffn.gate.w", _LAYER + "mlp.gate_proj.weight"),
    Row("blocks.{i}.ffn.up.w", _LAYER + "mlp.up_proj.weight"),
    Row("blocks.{i}.ffn.down.w", _LAYER + "mlp.down_proj.weight"),
    Row("final_norm.scale", "norm.weight"),
)

QK_NORM: Table = (
    Row("blocks.{i}.attn.q_norm.scale", _LAYER + "self_attn.q_norm.weight"),
    Row("blocks.{i}.attn.k_norm.scale", _LAYER + "self_attn.k_norm.weight"),
)

# Gemma 1 calls the norm in front of the feed-forward "post attention"; from Gemma 2 on that name
# means what it says.
PRE_NORMS: Table = (
    Row("blocks.{i}.pre_ffn_norm.scale", _LAYER + "post_attention_layernorm.weight"),
)
SANDWICH_NORMS: Table = (
    Row("blocks.{i}.post_attn_norm.scale", _LAYER + "post_attention_layernorm.weight"),
    Row("blocks.{i}.pre_ffn_norm.scale", _LAYER + "pre_feedforward_layernorm.weight"),
    Row("blocks.{i}.post_ffn_norm.scale", _LAYER + "post_feedforward_layernorm.weight"),
)

TIED: Table = (
    Row(None, "lm_head.weight", why="the output head is the embedding table"),
    Row(None, "layers.*.self_attn.rotary_emb.inv_freq", why="computed from the config"),
)
VISION: Table = (
    Row(None, "vision_tower.*", why="the text decoder sees no images"),
    Row(None, "multi_modal_projector.*", why="the text decoder sees no images"),
)


def hf_table(cfg: GemmaConfig, *, multimodal: bool = False) -> Table:
    """The rows that a decoder with the features of `cfg` has."""
    return (
        CORE
        + (SANDWICH_NORMS if cfg.post_norms else PRE_NORMS)
        + (QK_NORM if cfg.qk_norm else ())
        + TIED
        + (VISION if multimodal else ())
    )
