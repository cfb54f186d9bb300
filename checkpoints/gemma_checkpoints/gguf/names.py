"""Tensor names of GGUF files (llama.cpp `gguf-py/gguf/constants.py`).

Shapes are those of Hugging Face: GGUF prints them backwards, the memory is the same. Norm scales
have the one of `1 + scale` folded in (llama.cpp `conversion/gemma.py`, `norm_shift`); those of
Gemma 3n, which multiply by the scale itself, are as they are.
"""

from dataclasses import replace

from gemma_jax.config import AltUpConfig, GemmaConfig

from ..name_table import Row, Table

CORE: Table = (
    Row("embed.table", "token_embd.weight"),
    Row("blocks.{i}.pre_attn_norm.scale", "blk.{i}.attn_norm.weight", plus_one=True),
    Row("blocks.{i}.attn.q.w", "blk.{i}.attn_q.weight", "(N H) D -> N H D"),
    Row("blocks.{i}.attn.o.w", "blk.{i}.attn_output.weight", "D (N H) -> D N H"),
    Row("blocks.{i}.pre_ffn_norm.scale", "blk.{i}.ffn_norm.weight", plus_one=True),
    Row("blocks.{i}.ffn.gate.w", "blk.{i}.ffn_gate.weight"),
    Row("blocks.{i}.ffn.up.w", "blk.{i}.ffn_up.weight"),
    Row("blocks.{i}.ffn.down.w", "blk.{i}.ffn_down.weight"),
    Row("final_norm.scale", "output_norm.weight", plus_one=True),
)
KEYS_VALUES: Table = (
    Row("blocks.{i}.attn.k.w", "blk.{i}.attn_k.weight", "(K H) D -> K H D"),
    Row("blocks.{i}.attn.v.w", "blk.{i}.attn_v.weight", "(K H) D -> K H D"),
)

Q_NORM: Table = (Row("blocks.{i}.attn.q_norm.scale", "blk.{i}.attn_q_norm.weight", plus_one=True),)
K_NORM: Table = (Row("blocks.{i}.attn.k_norm.scale", "blk.{i}.attn_k_norm.weight", plus_one=True),)
POST_NORMS: Table = (
    Row("blocks.{i}.post_attn_norm.scale", "blk.{i}.post_attention_norm.weight", plus_one=True),
    Row("blocks.{i}.post_ffn_norm.scale", "blk.{i}.post_ffw_norm.weight", plus_one=True),
)

LAUREL: Table = (
    Row("blocks.{i}.laurel.left.w", "blk.{i}.laurel_l.weight"),
    Row("blocks.{i}.laurel.right.w", "blk.{i}.laurel_r.weight"),
    Row("blocks.{i}.laurel.norm.scale", "blk.{i}.laurel_post_norm.weight"),
)
PER_LAYER_TABLE = "per_layer_token_embd.weight"
PER_LAYER: Table = (
    Row("per_layer.table", PER_LAYER_TABLE, "V (L P) -> V L P"),
    Row("per_layer.proj.w", "per_layer_model_proj.weight", "(L P) D -> L P D"),
    Row("per_layer.norm.scale", "per_layer_proj_norm.weight"),
    Row("blocks.{i}.per_layer.gate.w", "blk.{i}.inp_gate.weight"),
    Row("blocks.{i}.per_layer.proj.w", "blk.{i}.proj.weight"),
    Row("blocks.{i}.per_layer.norm.scale", "blk.{i}.post_norm.weight"),
)
ALTUP: Table = (
    Row("blocks.{i}.altup.router_norm.scale", "blk.{i}.altup_router_norm.weight"),
    Row("blocks.{i}.altup.router.w", "blk.{i}.altup_router.weight"),
    Row("blocks.{i}.altup.predictor.w", "blk.{i}.altup_predict_coef.weight"),
    Row("blocks.{i}.altup.corrector.w", "blk.{i}.altup_correct_coef.weight"),
    Row("blocks.{i}.altup.output_scale", "blk.{i}.altup_correct_scale.weight"),
)
# Tensors that hold a stack of matrices -> the maps of ours that they are; see `in_stack`.
STACKS = {"altup_proj.weight": "spread_maps", "altup_unembd_proj.weight": "merge_maps"}

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
LAUREL_LEFT = "blk.0.laurel_l.weight"
TIED = Row(None, HEAD, why="it equals the embedding table")
OWN_HEAD = Row("embed.head", HEAD)


def gguf_table(cfg: GemmaConfig) -> Table:
    """The rows that a decoder with the features of `cfg` has."""
    rows = (
        CORE
        + _of_owners(KEYS_VALUES + (K_NORM if cfg.qk_norm else ()), cfg)
        + (POST_NORMS if cfg.post_norms else ())
        + (Q_NORM if cfg.qk_norm else ())
    )
    if not cfg.scale_plus_one:
        rows = tuple(replace(row, plus_one=False) for row in rows)
    return (
        rows
        + (LAUREL if cfg.laurel_rank else ())
        + (PER_LAYER if cfg.per_layer else ())
        + (_altup(cfg.altup) if cfg.altup else ())
        + (TIED if cfg.tied_head else OWN_HEAD,)
        + _unused(cfg)
    )


def in_stack(name: str, index: int) -> str:
    """What one matrix of a tensor out of `STACKS` is called here, as if it were a tensor."""
    return f"{name}[{index}]"


def _of_owners(table: Table, cfg: GemmaConfig) -> Table:
    """The rows for layers with keys and values of their own, one by one."""
    owners = [i for i, spec in enumerate(cfg.layers) if spec.kv != "shared"]
    return tuple(row.at(i) for row in table for i in owners)


def _unused(cfg: GemmaConfig) -> Table:
    """Keys and values of layers that read another's; llama.cpp loads them, and computes without."""
    return tuple(
        Row(None, f"blk.{i}.{name}.weight", why="the layer shares another's")
        for i, spec in enumerate(cfg.layers)
        if spec.kv == "shared"
        for name in ("attn_k", "attn_v", "attn_k_norm")
    )


def _altup(altup: AltUpConfig) -> Table:
    """With the maps from the first stream to the others, and back."""
    maps = tuple(
        Row(f"streams.{ours}.{j}.w", in_stack(theirs, j))
        for theirs, ours in STACKS.items()
        for j in range(altup.num_streams - 1)
    )
    return ALTUP + maps
