"""Tensor names of Hugging Face checkpoints (`modeling_*.py` of the Gemmas and of SigLIP).

The tables have them as short as they can be told apart: the decoder's from inside the decoder, the
tower's from inside `vision_tower.`, the projector's from inside `multi_modal_projector.`.
What transformers has put in front of them over the years:

| part                 | published files              | transformers since 4.52, in memory   |
|----------------------|------------------------------|--------------------------------------|
| decoder alone        | `model.`                     | `model.`                             |
| decoder with a tower | `language_model.model.`      | `model.language_model.`              |
| tower                | `vision_tower.vision_model.` | `model.vision_tower.[vision_model.]` |
| projector            | `multi_modal_projector.`     | `model.multi_modal_projector.`       |
| head with a tower    | `language_model.`            | none                                 |

Gemma 3n's published files are spelled as in memory, with a `timm_model.` inside its vision tower.
ShieldGemma 2 puts one or two `model.` more in front of these. Bare decoders have no prefix,
and neither has the head of a decoder alone.
"""

import re

from gemma_jax.config import AltUpConfig, GemmaConfig
from gemma_jax.encoder_config import MobileNetConfig, VisionConfig

from ..name_table import Row, Table
from .audio_names import AUDIO
from .audio_names import TOWER as _AUDIO_TOWER
from .mobilenet_names import mobilenet_rows

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
    Row("blocks.{i}.attn.o.w", _LAYER + "self_attn.o_proj.weight", "D (N H) -> D N H"),
    Row("blocks.{i}.ffn.gate.w", _LAYER + "mlp.gate_proj.weight"),
    Row("blocks.{i}.ffn.up.w", _LAYER + "mlp.up_proj.weight"),
    Row("blocks.{i}.ffn.down.w", _LAYER + "mlp.down_proj.weight"),
    Row("final_norm.scale", "norm.weight"),
)

KEYS: Table = (Row("blocks.{i}.attn.k.w", _LAYER + "self_attn.k_proj.weight", "(K H) D -> K H D"),)
VALUES = Row("blocks.{i}.attn.v.w", _LAYER + "self_attn.v_proj.weight", "(K H) D -> K H D")
LAYER_SCALE = Row("blocks.{i}.layer_scale.scale", _LAYER + "layer_scalar")

Q_NORM: Table = (Row("blocks.{i}.attn.q_norm.scale", _LAYER + "self_attn.q_norm.weight"),)
K_NORM: Table = (Row("blocks.{i}.attn.k_norm.scale", _LAYER + "self_attn.k_norm.weight"),)

# Gemma 1 calls the norm in front of the feed-forward "post attention"; from Gemma 2 on that name
# means what it says.
PRE_NORMS: Table = (
    Row("blocks.{i}.pre_ffn_norm.scale", _LAYER + "post_attention_layernorm.weight"),
)
VAULT_NORMS: Table = (
    Row("blocks.{i}.pre_ffn_norm.scale", _LAYER + "pre_feedforward_layernorm.weight"),
)
SANDWICH_NORMS: Table = (
    Row("blocks.{i}.post_attn_norm.scale", _LAYER + "post_attention_layernorm.weight"),
    Row("blocks.{i}.pre_ffn_norm.scale", _LAYER + "pre_feedforward_layernorm.weight"),
    Row("blocks.{i}.post_ffn_norm.scale", _LAYER + "post_feedforward_layernorm.weight"),
)

LAUREL: Table = (
    Row("blocks.{i}.laurel.left.w", _LAYER + "laurel.linear_left.weight"),
    Row("blocks.{i}.laurel.right.w", _LAYER + "laurel.linear_right.weight"),
    Row("blocks.{i}.laurel.norm.scale", _LAYER + "laurel.post_laurel_norm.weight"),
)
PER_LAYER: Table = (
    Row("per_layer.table", "embed_tokens_per_layer.weight", "V (L P) -> V L P"),
    Row("per_layer.proj.w", "per_layer_model_projection.weight", "(L P) D -> L P D"),
    Row("per_layer.norm.scale", "per_layer_projection_norm.weight"),
    Row("blocks.{i}.per_layer.gate.w", _LAYER + "per_layer_input_gate.weight"),
    Row("blocks.{i}.per_layer.proj.w", _LAYER + "per_layer_projection.weight"),
    Row("blocks.{i}.per_layer.norm.scale", _LAYER + "post_per_layer_input_norm.weight"),
)
ALTUP: Table = (
    Row("blocks.{i}.altup.router_norm.scale", _LAYER + "altup.router_norm.weight"),
    Row("blocks.{i}.altup.router.w", _LAYER + "altup.modality_router.weight"),
    Row("blocks.{i}.altup.predictor.w", _LAYER + "altup.prediction_coefs.weight"),
    Row("blocks.{i}.altup.corrector.w", _LAYER + "altup.correction_coefs.weight"),
)
OUTPUT_SCALE = Row("blocks.{i}.altup.output_scale", _LAYER + "altup.correct_output_scale")

# Of each of Gemma 3n's vocabularies, by its first id.
_EMBEDDER: Table = (
    Row("table", "embedding.weight"),
    Row("norm.scale", "hard_embedding_norm.weight"),
    Row("soft_norm.scale", "soft_embedding_norm.weight"),
    Row("proj.w", "embedding_projection.weight"),
)
_EMBED_VISION, _EMBED_AUDIO = "embed_vision.", "embed_audio."

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
DENSE, LINEAR = "dense.", "linear.weight"
TIED = Row(None, HEAD, why="it equals the embedding table")
OWN_HEAD = Row("embed.head", HEAD)

# Buffers that transformers computes from the config. Releases differ in which of them they store,
# and in where they hang: on every layer (4.3x), on the model, one per kind of layer (5.x).
BUFFERS: Table = tuple(
    Row(None, name, why="computed from the config")
    for name in (
        "*rotary_emb*inv_freq",
        "*rotary_emb*_cached",
        "*embed_scale",
        "*embeddings.position_ids",
        "per_layer_projection_scale",
        "per_layer_input_scale",
        "layers.*.altup.router_input_scale",
        "layers.*.self_attn.v_norm.weight",
        "embed_vision.embedding_post_projection_norm.weight",
        "embed_audio.embedding_post_projection_norm.weight",
        "audio_tower.*.inv_timescales",
        "audio_tower.*.q_scale",
        "audio_tower.*.softcap",
        "audio_tower.*.local_causal_valid_mask",
        "audio_tower.*.gradient_clipping",
    )
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


def is_gemma1(cfg: GemmaConfig) -> bool:
    """Of a model without norms behind its parts: whether it is a Gemma 1, and no VaultGemma, whose
    attention has windows, soft caps and a scale of its own."""
    plain = all(spec.kind == "global" for spec in cfg.layers) and cfg.final_soft_cap is None
    scaled = cfg.query_pre_attn_scalar != cfg.head_dim or cfg.attn_soft_cap is not None
    return plain and not scaled and cfg.origin != "vaultgemma"


def hf_table(cfg: GemmaConfig) -> Table:
    """The rows that a model with the features of `cfg` has."""
    return (
        CORE
        + _of_owners(KEYS + (K_NORM if cfg.qk_norm else ()), cfg)
        + tuple(VALUES.at(i) for i in _owners(cfg) if cfg.layers[i].values == "own")
        + (SANDWICH_NORMS if cfg.post_norms else PRE_NORMS if is_gemma1(cfg) else VAULT_NORMS)
        + (Q_NORM if cfg.qk_norm else ())
        + (LAUREL if cfg.laurel_rank else ())
        + (PER_LAYER if cfg.per_layer else ())
        + _layer_scales(cfg)
        + (_altup(cfg.altup) if cfg.altup else ())
        + _vision(cfg)
        + (AUDIO if cfg.audio else ())
        + (TIED if cfg.tied_head else OWN_HEAD,)
        + BUFFERS
        + _embedders(cfg)
        + dense_rows(cfg)
        + (_unread(cfg) if cfg.origin in ("gemma3n_text", "gemma4_text") else ())
        + unused(cfg)
    )


def _of_owners(table: Table, cfg: GemmaConfig) -> Table:
    """The rows for layers with keys and values of their own, one by one."""
    return tuple(row.at(i) for row in table for i in _owners(cfg))


def _owners(cfg: GemmaConfig) -> list[int]:
    return [i for i, spec in enumerate(cfg.layers) if spec.makes_keys]


def _layer_scales(cfg: GemmaConfig) -> Table:
    scaled = [i for i, spec in enumerate(cfg.layers) if "layer_scale" in cfg.sub_blocks_of(spec)]
    return tuple(LAYER_SCALE.at(i) for i in scaled)


def _altup(altup: AltUpConfig) -> Table:
    """With the maps from the first stream to the others, and back."""
    maps = tuple(
        Row(f"streams.{ours}.{j}.w", f"{theirs}.{j}.weight")
        for ours, theirs in (
            ("spread_maps", "altup_projections"),
            ("merge_maps", "altup_unembed_projections"),
        )
        for j in range(altup.num_streams - 1)
    )
    return ALTUP + ((OUTPUT_SCALE,) if altup.correct_scale else ()) + maps


def _vision(cfg: GemmaConfig) -> Table:
    match cfg.vision:
        case VisionConfig():
            return VISION
        case MobileNetConfig():
            return mobilenet_rows(cfg.vision, theirs=_TOWER + "timm_model.")
    return ()


def _embedders(cfg: GemmaConfig) -> Table:
    """The vocabularies of images and sounds, in this order if there are no towers to tell."""
    parts = dict(enumerate((_EMBED_VISION, _EMBED_AUDIO)))
    if cfg.vision is not None or cfg.audio is not None:
        tokens = {
            _EMBED_VISION: cfg.vision and cfg.vision.image_token,
            _EMBED_AUDIO: cfg.audio and cfg.audio.audio_token,
        }
        parts = {cfg.vocabulary_of(t): part for part, t in tokens.items() if t is not None}
    return tuple(
        Row(f"modality_embedders.{ids.first_id}.{row.ours}", parts[i] + row.theirs)
        for i, ids in enumerate(cfg.modality_vocabularies)
        if i in parts
        for row in _EMBEDDER
    )


def dense_rows(cfg: GemmaConfig) -> Table:
    """The dense layers of a sentence-transformers folder, each of which has a file of its own; the
    names here say which one it is (see `sentence_folder.py`)."""
    head = cfg.text_embedding
    return tuple(
        Row(f"text_embedding.dense.{i}.w", f"{DENSE}{i}.{LINEAR}")
        for i in range(0 if head is None else len(head.dense))
    )


def _unread(cfg: GemmaConfig) -> Table:
    """What files of Gemma 3n and 4 hold for modalities that the model does not have."""
    has = {_EMBED_VISION: cfg.vision is not None, _EMBED_AUDIO: cfg.audio is not None}
    if not any(has.values()) and cfg.modality_vocabularies:
        has = dict.fromkeys(has, True)
    return tuple(
        Row(None, part + "*", why="the model has no such modality")
        for tower, embedder, sees in (
            (_TOWER, _EMBED_VISION, cfg.vision is not None),
            (_AUDIO_TOWER, _EMBED_AUDIO, cfg.audio is not None),
        )
        for part in ((tower,) * (not sees) + (embedder,) * (not has[embedder]))
    )


def unused(cfg: GemmaConfig) -> Table:
    """What checkpoints hold, and no model computes with."""
    shared = tuple(
        Row(None, f"layers.{i}.self_attn.{name}.weight", why="the layer shares another's")
        for i, spec in enumerate(cfg.layers)
        if spec.kv == "shared"
        for name in ("k_proj", "v_proj", "k_norm")
    )
    unscaled = cfg.altup is not None and not cfg.altup.correct_scale
    scales = Row(None, "layers.*.altup.correct_output_scale", why="altup_correct_scale is false")
    return shared + ((scales,) if unscaled else ())


# A tower whose config is absent or broken; the decoder can be had without it.
UNREAD_TOWER: Table = tuple(
    Row(None, part + "*", why="only the decoder is read") for part in (_TOWER, _PROJECTOR)
)


def short_name(name: str) -> str:
    """The name of a tensor as the tables have it, whatever was put in front of it."""
    prefix = _PREFIX.match(name)
    return (prefix["tower"] or "") + name[prefix.end() :]


def published_name(short: str, cfg: GemmaConfig) -> str:
    """A name of the tables as the published files of such models spell it."""
    bare = cfg.text_embedding is not None or cfg.bidirectional
    if bare and cfg.vision is None and cfg.audio is None:
        return short
    if not cfg.scale_plus_one and (cfg.vision is not None or cfg.audio is not None):
        parts = (_TOWER, _AUDIO_TOWER, _EMBED_VISION, _EMBED_AUDIO)
        if short == HEAD:
            return HEAD
        return ("model." if short.startswith(parts) else "model.language_model.") + short
    if short.startswith(_PROJECTOR):
        return short
    if short.startswith(_TOWER):
        return short.replace(_TOWER, _TOWER + "vision_model.", 1)
    if short == HEAD:
        return HEAD if cfg.vision is None else "language_model." + HEAD
    return ("model." if cfg.vision is None else "language_model.model.") + short
