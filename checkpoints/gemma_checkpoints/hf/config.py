"""`config.json` of Hugging Face -> `GemmaConfig`; `config_out.py` is the way back.

Two spellings are in the wild and both are read: published files (`rope_theta`,
`rope_local_base_freq`, `rope_scaling`, `sliding_window_pattern`) and those that transformers 5
writes (`layer_types`, `rope_parameters`). A key that is missing means the default of the
transformers class, which the published multimodal configs rely on.
Source: `models/gemma{,2,3,3n,4}/configuration_gemma{,2,3,3n,4}.py` of transformers.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

from gemma_jax.config import (
    Activation,
    AltUpConfig,
    GemmaConfig,
    LayerSpec,
    ModalityVocabulary,
    PerLayerConfig,
    share_kv,
)
from gemma_jax.storages import one_of

from ..json_values import Json, depth, flag, nested, positive, whole
from . import layer_heads
from .audio_config import audio_from_hf
from .config_keys import refuse_unknown_keys
from .mobilenet_config import mobilenet_from_hf
from .vision_config import vision_from_hf

_COMMON = {
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
_GEMMA2 = _COMMON | {
    "vocab_size": 256_000,
    "hidden_size": 2_304,
    "intermediate_size": 9_216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8_192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4_096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
DEFAULTS: Mapping[str, Json] = {
    "gemma": _COMMON
    | {
        "vocab_size": 256_000,
        "hidden_size": 3_072,
        "intermediate_size": 24_576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8_192,
    },
    "gemma2": _GEMMA2,
    "vaultgemma": _GEMMA2,
    "gemma3_text": _COMMON
    | {
        "vocab_size": 262_208,
        "hidden_size": 2_304,
        "intermediate_size": 9_216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4_096,
        "final_logit_softcapping": None,
    },
    "gemma3n_text": _COMMON
    | {
        "vocab_size": 262_400,
        "hidden_size": 2_048,
        "intermediate_size": 16_384,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "sliding_window": 512,
        "final_logit_softcapping": 30.0,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_num_inputs": 4,
        "num_kv_shared_layers": 15,
        "laurel_rank": 64,
    },
    layer_heads.FAMILY: layer_heads.DEFAULTS,
}
ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "vaultgemma": "VaultGemmaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gemma3n_text": "Gemma3nForCausalLM",
    "gemma4_text": "Gemma4ForCausalLM",
}
# Relatives that are more than this decoder with towers, and what keeps them out.
OTHERS: Mapping[str, str] = {
    "t5gemma": "an encoder beside its decoder, which attends to it",
    "t5gemma2": "an encoder beside its decoder, whose attention sees both at once",
    "recurrent_gemma": "recurrent layers",
    "paligemma": "an older vision tower, and prompts that it reads both ways",
}
BARE = "Gemma3TextModel"  # without a head: what reads both ways has no next token to guess
# Layers of a period, of which the last is global.
PATTERN = {
    "gemma": 1,
    "gemma2": 2,
    "vaultgemma": 2,
    "gemma3_text": 6,
    "gemma3n_text": 5,
    "gemma4_text": 6,
}
THETA = {"global": 1_000_000.0, "local": 10_000.0}
Kind = Literal["local", "global"]
KINDS: dict[str, Kind] = {
    "full_attention": "global",
    "sliding_attention": "local",
}
# By the names of transformers; of two names for one function the first is written.
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",  # the only exact one of Gemma 1, where "gelu" is none
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
}
ACTIVATION_KEYS = (
    "hidden_act",
    "hidden_activation",
)  # Gemma 1 reads the first, all others the last
# Models with a tower around a `gemma3_text`. ShieldGemma 2 differs in what it was trained for.
MULTIMODAL = ("gemma3", "shieldgemma2")
# Towers for images and sounds around a `gemma3n_text`.
GEMMA3N = "gemma3n"
# Families whose config has a text config inside, and what that is.
INNER = dict.fromkeys(MULTIMODAL, "gemma3_text") | {
    GEMMA3N: "gemma3n_text",
    layer_heads.OUTER: layer_heads.FAMILY,
}
TOWERS = ("image", "audio")  # modalities that a model may have beside text


def text_config(raw: Json) -> Json:
    """The part of a config that describes the text decoder, as a config of its own if need be.

    `Gemma3ForConditionalGeneration` never applies `final_logit_softcapping`, so it is cleared; that
    of Gemma 3n and 4 applies it.
    """
    if raw.get("model_type") not in tuple(INNER):
        return raw
    family = INNER[raw["model_type"]]
    inner = nested(raw, "text_config")
    if (kind := inner.get("model_type", family)) != family:
        raise ValueError(f"model_type {kind!r} of text_config is not {family!r}")
    tied = {"tie_word_embeddings": _is_tied(raw, inner)}
    fixed = {"model_type": family, "architectures": [ARCHITECTURES[family]]}
    uncapped = {"final_logit_softcapping": None} if family == "gemma3_text" else {}
    return inner | tied | fixed | uncapped


def _is_tied(raw: Json, inner: Json) -> bool:
    """What a config with a text config says of the head: the outer one counts, except that
    ShieldGemma 2 takes the inner one's word for it (`ShieldGemma2Config.__post_init__`)."""
    tied = flag(raw, "tie_word_embeddings", default=raw["model_type"] != "shieldgemma2")
    inner_counts = raw["model_type"] == "shieldgemma2"
    return tied or (inner_counts and flag(inner, "tie_word_embeddings", default=True))


def config_from_hf(raw: Json, *, modalities: Collection[str] = TOWERS) -> GemmaConfig:
    """The architecture that a `config.json` declares.

    Whether a head is tied is what the config says; the files have the last word (`heads.py`).

    Args:
      modalities: Out of `"image"` and `"audio"`. What it says of others is not read, and may be
        absent: Gemma 3n's vocabularies stay with their modalities.

    Raises:
      ValueError: a model type, activation, rope type or switch that this library does not have, or
        a value of the wrong type. Nothing is guessed.
    """
    text = text_config(raw)
    family = text.get("model_type")
    if family in tuple(OTHERS):
        raise ValueError(f"model_type {family!r} is not supported: it has {OTHERS[family]}")
    if family not in tuple(DEFAULTS):
        raise ValueError(
            f"model_type {raw.get('model_type')!r} is not supported; "
            f"expected one of: {', '.join([*DEFAULTS, *INNER])}"
        )
    gemma3n, gemma4 = family == "gemma3n_text", family == layer_heads.FAMILY
    if gemma4:
        layer_heads.refuse_towers(raw, [one for one in TOWERS if one in modalities])
        layer_heads.refuse_variants(text)
    refuse_unknown_keys(raw, modalities)
    text = DEFAULTS[family] | text
    layers = depth(text, "num_hidden_layers")
    capped = family in ("gemma2", "vaultgemma")
    specs, bidirectional = _layer_specs(text, layers), _bidirectional(text)
    if gemma3n or gemma4:
        specs = share_kv(specs, whole(text, "num_kv_shared_layers", least=0))
    specs = layer_heads.with_heads(text, specs) if gemma4 else specs
    cfg = GemmaConfig(
        vocab_size=whole(text, "vocab_size"),
        d_model=whole(text, "hidden_size"),
        num_heads=whole(text, "num_attention_heads"),
        num_kv_heads=whole(text, "num_key_value_heads"),
        head_dim=whole(text, "head_dim"),
        query_pre_attn_scalar=_query_scalar(text),
        layers=specs,
        max_positions=whole(text, "max_position_embeddings"),
        norm_eps=positive(text, "rms_norm_eps"),
        qk_norm=family in ("gemma3_text", "gemma3n_text", layer_heads.FAMILY),
        post_norms=family not in ("gemma", "vaultgemma"),
        activation=_activation(text),
        # Gemma3Attention never applies attn_logit_softcapping, whatever its config says.
        attn_soft_cap=_cap(text, "attn_logit_softcapping") if capped else None,
        final_soft_cap=None if family == "gemma" else _cap(text, "final_logit_softcapping"),
        optional_final_cap=gemma3n,
        bidirectional=bidirectional,
        origin=family,
        tied_head=flag(text, "tie_word_embeddings", default=True),
        **_gemma3n_parts(text) if gemma3n else layer_heads.parts(text) if gemma4 else {},
    )
    if raw["model_type"] in MULTIMODAL and "image" in modalities:
        return replace(cfg, vision=vision_from_hf(raw))
    return _with_towers(cfg, raw, modalities) if raw["model_type"] == GEMMA3N else cfg


def _with_towers(cfg: GemmaConfig, raw: Json, modalities: Collection[str]) -> GemmaConfig:
    """The config with Gemma 3n's towers, and the vocabularies that are embedded in their widths."""
    towers, vocabularies = {}, []
    if "image" in modalities:
        towers["vision"], ids = mobilenet_from_hf(raw)
        _check_placeholder("image_token_id", towers["vision"].image_token, ids)
        vocabularies.append(ids)
    if "audio" in modalities:
        towers["audio"], ids = audio_from_hf(raw)
        _check_placeholder("audio_token_id", towers["audio"].audio_token, ids)
        vocabularies.append(ids)
    ends = [ids.first_id + ids.vocab_size for ids in vocabularies]
    if len(ends) == 2 and ends[0] > vocabularies[1].first_id:
        raise ValueError(
            f"the vocabulary of images ends at id {ends[0]}, behind the beginning of that of "
            f"sounds, audio_config.vocab_offset {vocabularies[1].first_id}"
        )
    return replace(cfg, **towers, modality_vocabularies=tuple(vocabularies))


def _check_placeholder(key: str, token: int, ids: ModalityVocabulary) -> None:
    """transformers embeds a placeholder with the vocabulary that it lies in."""
    if not 0 <= token - ids.first_id < ids.vocab_size:
        raise ValueError(
            f"{key} {token} must be an id of its vocabulary, {ids.first_id} to "
            f"{ids.first_id + ids.vocab_size - 1}"
        )


def _query_scalar(text: Json) -> float:
    match text["model_type"]:
        case "gemma":
            return whole(text, "head_dim")
        case "gemma3n_text" | layer_heads.FAMILY:
            return 1  # their attention leaves the scale to its norms
        case _:
            return positive(text, "query_pre_attn_scalar")


def _gemma3n_parts(text: Json) -> Json:
    clip = text["altup_coef_clip"]
    return dict(
        scale_plus_one=False,
        v_norm=True,
        laurel_rank=whole(text, "laurel_rank"),
        per_layer=PerLayerConfig(
            width=whole(text, "hidden_size_per_layer_input"),
            vocab_size=whole(text, "vocab_size_per_layer_input"),
        ),
        altup=AltUpConfig(
            num_streams=whole(text, "altup_num_inputs"),
            active=whole(text, "altup_active_idx", least=0),
            coef_clip=None if clip is None else positive(text, "altup_coef_clip"),
            correct_scale=bool(text["altup_correct_scale"]),
        ),
    )


def _activation(text: Json) -> Activation:
    """By the key that the transformers class reads; the other one may only say the same."""
    family = text["model_type"]
    key, other = ACTIVATION_KEYS if family == "gemma" else ACTIVATION_KEYS[::-1]
    found = _named_activation(text, key) or "gelu_tanh"
    if _named_activation(text, other) not in (None, found):
        raise ValueError(
            f"{other} {text[other]!r} has no effect in transformers: {family} reads {key}; "
            "remove one of them"
        )
    return found


def _named_activation(text: Json, key: str) -> Activation | None:
    name = text.get(key)
    if name is None:
        return None
    if name not in tuple(ACTIVATIONS):
        raise ValueError(f"{key} {name!r} is not supported; expected {one_of(tuple(ACTIVATIONS))}")
    # Gemma 1's published configs say "gelu", and mean the tanh approximation.
    return "gelu_tanh" if text["model_type"] == "gemma" and name == "gelu" else ACTIVATIONS[name]


def _kinds(text: Json, layers: int) -> list[Kind]:
    kinds = _named_kinds(text, layers)
    # Gemma4TextConfig makes the last layer global, whatever the file says of it.
    return [*kinds[:-1], "global"] if text["model_type"] == layer_heads.FAMILY else kinds


def _named_kinds(text: Json, layers: int) -> list[Kind]:
    names = text.get("layer_types")
    if names is None:
        period = text.get("sliding_window_pattern")
        period = PATTERN[text["model_type"]] if period is None else period
        period = whole({"sliding_window_pattern": period}, "sliding_window_pattern")
        # transformers writes this beside layer_types, and does not read it.
        if (other := text.get("_sliding_window_pattern", period)) != period:
            raise ValueError(
                f"_sliding_window_pattern {other!r} has no effect in transformers; write "
                "sliding_window_pattern or layer_types"
            )
        return ["local" if (i + 1) % period else "global" for i in range(layers)]
    known = isinstance(names, list) and all(name in tuple(KINDS) for name in names)
    if not known or len(names) != layers:
        raise ValueError(
            f"layer_types must hold one of {', '.join(KINDS)} for each layer ({layers})"
        )
    return [KINDS[name] for name in names]


def _layer_specs(text: Json, layers: int) -> tuple[LayerSpec, ...]:
    ropes = {kind: _read_rope(text, kind) for kind in set(_kinds(text, layers))}
    widths = _per_layer(text, "intermediate_size", layers)
    sparsities = _sparsities(text, layers)
    return tuple(
        LayerSpec(
            kind=kind,
            window=_window(text) if kind == "local" else None,
            rope_theta=ropes[kind][0],
            rope_scale=ropes[kind][1],
            rotary_share=ropes[kind][2],
            d_ff=whole({"intermediate_size": width}, "intermediate_size"),
            sparsity=sparsity,
        )
        for kind, width, sparsity in zip(_kinds(text, layers), widths, sparsities)
    )


def _window(text: Json) -> int:
    """Of a model that reads both ways, the file says how long the window is from end to end; from
    the token to either side, itself included, that is half (`Gemma3TextConfig.__post_init__`)."""
    window = whole(text, "sliding_window")
    return window // 2 + 1 if _bidirectional(text) else window


def _bidirectional(text: Json) -> bool:
    key = "use_bidirectional_attention"
    if text["model_type"] == layer_heads.FAMILY:
        return False  # or only between soft tokens
    if not flag(text, key, default=False):
        return False
    if text["model_type"] != "gemma3_text":
        raise ValueError(f"{key} is set; only gemma3_text is supported with it")
    return True


def _per_layer(text: Json, key: str, layers: int) -> list:
    """One value per layer; Gemma 3n may list them."""
    value = text[key]
    if not isinstance(value, list):
        return [value] * layers
    if text["model_type"] != "gemma3n_text" or len(value) != layers:
        raise ValueError(f"{key} lists {len(value)} values; expected one value, or {layers}")
    return value


def _sparsities(text: Json, layers: int) -> list[float]:
    if text["model_type"] != "gemma3n_text":
        return [0.0] * layers
    # The default of Gemma3nTextConfig (transformers 5.24): the first ten layers, if there are more.
    num_sparse = 10 if layers > 10 else 0
    default = [0.95] * num_sparse + [0.0] * (layers - num_sparse)
    pattern = text.get("activation_sparsity_pattern")
    values = default if pattern is None else pattern
    values = values if isinstance(values, list) else [values] * layers
    if len(values) != layers or not all(isinstance(v, int | float) and 0 <= v < 1 for v in values):
        raise ValueError(f"activation_sparsity_pattern must hold {layers} numbers in [0, 1)")
    return [float(v) for v in values]


def _read_rope(text: Json, kind: str) -> tuple[float, float, float]:
    """`(theta, scale, share)`. Gemma 3's `rope_scaling` is for global layers only."""
    gemma4 = text["model_type"] == layer_heads.FAMILY
    per_kind = gemma4 or text["model_type"] in ("gemma3_text", "gemma3n_text")
    name = {ours: theirs for theirs, ours in KINDS.items()}[kind]
    rope = nested(text, "rope_parameters")
    rope = nested(rope, name) if per_kind else rope
    local = per_kind and kind == "local"
    if not local:
        rope = rope | nested(text, "rope_scaling")
    theta_key = "rope_local_base_freq" if local else "rope_theta"
    default = THETA[kind] if per_kind else THETA["local"]
    if gemma4 and not rope and kind == "global":
        rope = {"rope_type": "proportional", "partial_rotary_factor": layer_heads.ROTARY_SHARE}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    known = ("default", "linear", *(("proportional",) if gemma4 else ()))
    share = rope.get("partial_rotary_factor", 1)
    if rope_type not in known or (share != 1 and rope_type != "proportional"):
        raise ValueError(f"rope {rope} is not supported; expected rope_type {one_of(known)}")
    theta = positive({theta_key: rope.get("rope_theta", text.get(theta_key, default))}, theta_key)
    scaled = rope_type == "linear" or (rope_type == "proportional" and "factor" in rope)
    return theta, positive(rope, "factor") if scaled else 1.0, float(share)


def _cap(text: Json, key: str) -> float | None:
    return None if text.get(key) is None else positive(text, key)
