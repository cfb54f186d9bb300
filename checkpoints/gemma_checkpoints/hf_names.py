"""Tensor names of Hugging Face checkpoints (`modeling_{gemma,gemma2,gemma3,siglip}.py`).

The tables have them as short as they can be told apart: the decoder's from inside the decoder, the
tower's from inside `vision_tower.`, the projector's from inside `multi_modal_projector.`.
What transformers has put in front of them over the years:

| part                 | published files              | transformers since 4.52, in memory   |
|----------------------|------------------------------|--------------------------------------|
| decoder alone        | `model.`                     | `model.`                             |
| decoder with a tower | `language_model.model.`      | `model.language_model.`              |
| tower                | `vision_tower.vision_model.` | `model.vision_tower.[vision_model.]` |
| projector            | `multi_modal_projector.`     | `model.multi_modal_projector.`       |

ShieldGemma 2 puts one or two `model.` more in front of these. Bare decoders have no prefix.
"""

import re

from gemma_jax.config import GemmaConfig

from .table import Row, Table

_PREFIX = re.compile(
    r"(model\.)*(language_model\.(model\.)?|(?P<tower>vision_tower\.)(vision_model\.)?)?"
)
_LAYER = "layers.{i}."
_TOWER, _PROJECTOR = "vision_tower.", "multi_modal_projector."
_TOWER_BLOCK, _TOWER_LAYER = "vision.tower.blocks.{i}.", _TOWER + "encoder.layers.{i}."

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
    Row("vision.tower.patches.proj.w", _TOWER + "embeddings.patch_embedding.weight"),
    Row("vision.tower.patches.proj.bias", _TOWER + "embeddings.patch_embedding.bias"),
    Row("vision.tower.patches.positions", _TOWER + "embeddings.position_embedding.weight"),
    Row(_TOWER_BLOCK + "pre_attn_norm.scale", _TOWER_LAYER + "layer_norm1.weight"),
    Row(_TOWER_BLOCK + "pre_attn_norm.bias", _TOWER_LAYER + "layer_norm1.bias"),
    Row(_TOWER_BLOCK + "attn.q.w", _TOWER_LAYER + "self_attn.q_proj.weight", "(N H) C -> N H C"),
    Row(_TOWER_BLOCK + "attn.q.bias", _TOWER_LAYER + "self_attn.q_proj.bias", "(N H) -> N H"),
    Row(_TOWER_BLOCK + "attn.k.w", _TOWER_LAYER + "self_attn.k_proj.weight", "(N H) C -> N H C"),
    Row(_TOWER_BLOCK + "attn.k.bias", _TOWER_LAYER + "self_attn.k_proj.bias", "(N H) -> N H"),
    Row(_TOWER_BLOCK + "attn.v.w", _TOWER_LAYER + "self_attn.v_proj.weight", "(N H) C -> N H C"),
    Row(_TOWER_BLOCK + "attn.v.bias", _TOWER_LAYER + "self_attn.v_proj.bias", "(N H) -> N H"),
    Row(_TOWER_BLOCK + "attn.o.w", _TOWER_LAYER + "self_attn.out_proj.weight", "C (N H) -> C N H"),
    Row(_TOWER_BLOCK + "attn.o.bias", _TOWER_LAYER + "self_attn.out_proj.bias"),
    Row(_TOWER_BLOCK + "pre_ffn_norm.scale", _TOWER_LAYER + "layer_norm2.weight"),
    Row(_TOWER_BLOCK + "pre_ffn_norm.bias", _TOWER_LAYER + "layer_norm2.bias"),
    Row(_TOWER_BLOCK + "ffn.up.w", _TOWER_LAYER + "mlp.fc1.weight"),
    Row(_TOWER_BLOCK + "ffn.up.bias", _TOWER_LAYER + "mlp.fc1.bias"),
    Row(_TOWER_BLOCK + "ffn.down.w", _TOWER_LAYER + "mlp.fc2.weight"),
    Row(_TOWER_BLOCK + "ffn.down.bias", _TOWER_LAYER + "mlp.fc2.bias"),
    Row("vision.tower.final_norm.scale", _TOWER + "post_layernorm.weight"),
    Row("vision.tower.final_norm.bias", _TOWER + "post_layernorm.bias"),
    Row("vision.projector.norm.scale", _PROJECTOR + "mm_soft_emb_norm.weight"),
    # The one matrix of the model that is stored input first.
    Row("vision.projector.proj.w", _PROJECTOR + "mm_input_projection_weight", "C D -> D C"),
)


def hf_table(cfg: GemmaConfig) -> Table:
    """The rows that a model with the features of `cfg` has."""
    return (
        CORE
        + (SANDWICH_NORMS if cfg.post_norms else PRE_NORMS)
        + (QK_NORM if cfg.qk_norm else ())
        + (VISION if cfg.vision else ())
        + TIED
    )


def short_name(name: str) -> str:
    """The name of a tensor as the tables have it, whatever was put in front of it."""
    prefix = _PREFIX.match(name)
    return (prefix["tower"] or "") + name[prefix.end() :]


def published_name(short: str, cfg: GemmaConfig) -> str:
    """A name of the tables as the published files of such models spell it."""
    if short.startswith(_PROJECTOR):
        return short
    if short.startswith(_TOWER):
        return short.replace(_TOWER, _TOWER + "vision_model.", 1)
    return ("model." if cfg.vision is None else "language_model.model.") + short
