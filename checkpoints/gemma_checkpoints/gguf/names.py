"""Tensor names of GGUF files (llama.cpp `gguf-py/gguf/constants.py`).

Shapes are those of Hugging Face: GGUF prints them backwards, the memory is the same. Norm scales
have the one of `1 + scale` folded in (llama.cpp `convert_hf_to_gguf.py`, `Gemma3Model`).
"""

from gemma_jax.config import GemmaConfig

from ..name_table import Row, Table

CORE: Table = (
    Row("embed.table", "token_embd.weight"),
    Row("blocks.{i}.pre_attn_norm.scale", "blk.{i}.attn_norm.weight", plus_one=True),
    Row("blocks.{i}.attn.q.w", "blk.{i}.attn_q.weight", "(N H) D -> N H D"),
    Row("blocks.{i}.attn.k.w", "blk.{i}.attn_k.weight", "(K H) D -> K H D"),
    Row("blocks.{i}.attn.v.w", "blk.{i}.attn_v.weight", "(K H) D -> K H D"),
    Row("blocks.{i}.attn.o.w", "blk.{i}.attn_output.weight", "D (N H) -> D N H"),
    Row("blocks.{i}.pre_ffn_norm.scale", "blk.{i}.ffn_norm.weight", plus_one=True),
    Row("blocks.{i}.ffn.gate.w", "blk.{i}.ffn_gate.weight"),
    Row("blocks.{i}.ffn.up.w", "blk.{i}.ffn_up.weight"),
    Row("blocks.{i}.ffn.down.w", "blk.{i}.ffn_down.weight"),
    Row("final_norm.scale", "output_norm.weight", plus_one=True),
)

QK_NORM: Table = (
    Row("blocks.{i}.attn.q_norm.scale", "blk.{i}.attn_q_norm.weight", plus_one=True),
    Row("blocks.{i}.attn.k_norm.scale", "blk.{i}.attn_k_norm.weight", plus_one=True),
)
POST_NORMS: Table = (
    Row("blocks.{i}.post_attn_norm.scale", "blk.{i}.post_attention_norm.weight", plus_one=True),
    Row("blocks.{i}.post_ffn_norm.scale", "blk.{i}.post_ffw_norm.weight", plus_one=True),
)
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
TIED = Row(None, HEAD, why="it equals the embedding table")
OWN_HEAD = Row("embed.head", HEAD)


def gguf_table(cfg: GemmaConfig) -> Table:
    """The rows that a decoder with the features of `cfg` has."""
    norms = (POST_NORMS if cfg.post_norms else ()) + (QK_NORM if cfg.qk_norm else ())
    return (*CORE, *norms, TIED if cfg.tied_head else OWN_HEAD)
