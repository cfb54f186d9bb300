"""What becomes of every key of a `config.json`: read, passed over for a reason, or refused.

`READ` are the keys that `config.py` and its like for towers read, by the `model_type` of the object
that they stand in. `UNREAD` are those that change no number of the model, by the reason why.
`UNSET` are switches that only models without them may have. Any other key is refused by its name:
nobody here knows what it does.

Sources: `PreTrainedConfig` and `Gemma*Config` of transformers 4.50 and 5.24, and published files.
"""

from collections.abc import Collection, Iterator, Mapping

from ..json_values import Json, nested
from . import audio_config as sounds
from . import mobilenet_config as images

_DECODER = """
    model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps hidden_act hidden_activation
    rope_theta rope_scaling rope_parameters tie_word_embeddings use_bidirectional_attention
"""
_WINDOWS = "sliding_window layer_types final_logit_softcapping"
_OUTER = """
    model_type text_config vision_config mm_tokens_per_image tie_word_embeddings image_token_index
    image_token_id boi_token_index boi_token_id eoi_token_index eoi_token_id
"""
READ: Mapping[str, frozenset[str]] = {
    kind: frozenset(" ".join(keys).split())
    for kind, keys in {
        "gemma": (_DECODER,),
        "gemma2": (_DECODER, _WINDOWS, "query_pre_attn_scalar attn_logit_softcapping"),
        "vaultgemma": (_DECODER, _WINDOWS, "query_pre_attn_scalar attn_logit_softcapping"),
        "gemma3_text": (
            _DECODER, _WINDOWS, "query_pre_attn_scalar rope_local_base_freq",
            "sliding_window_pattern _sliding_window_pattern",
        ),
        "gemma3n_text": (
            _DECODER, _WINDOWS, "rope_local_base_freq vocab_size_per_layer_input",
            "hidden_size_per_layer_input altup_active_idx altup_coef_clip altup_correct_scale",
            "altup_num_inputs num_kv_shared_layers laurel_rank activation_sparsity_pattern",
        ),
        "gemma4_text": (
            _DECODER, _WINDOWS, "vocab_size_per_layer_input hidden_size_per_layer_input",
            "num_kv_shared_layers use_double_wide_mlp attention_k_eq_v enable_moe_block",
            "global_head_dim num_global_key_value_heads per_layer_config",
        ),
        "gemma4": ("model_type text_config vision_config audio_config tie_word_embeddings",),
        "gemma3": (_OUTER,),
        "shieldgemma2": (_OUTER,),
        "gemma3n": (
            "model_type text_config vision_config audio_config tie_word_embeddings",
            " ".join([*images.OUTER_DEFAULTS, *sounds.OUTER_DEFAULTS]),
        ),
        "gemma3n_vision": (" ".join(images.DEFAULTS), "model_args"),
        "gemma3n_audio": (" ".join(sounds.DEFAULTS),),
        "siglip_vision_model": (
            "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads",
            "image_size patch_size layer_norm_eps hidden_act num_channels vision_use_head",
        ),
    }.items()
}  # fmt: skip

UNREAD: Mapping[str, str] = {
    key: why
    for why, keys in {
        "model_type and the tensors say it": "architectures",
        "the files say how their tensors are stored": "dtype torch_dtype use_bfloat16",
        "where the file comes from": """
            _name_or_path name_or_path _commit_hash transformers_version unsloth_version
            unsloth_fixed model_name""",
        "how transformers runs a model, not what it computes": """
            use_cache cache_implementation return_dict use_return_dict output_attentions
            _output_attentions output_hidden_states torchscript chunk_size_feed_forward
            attn_implementation _attn_implementation _attn_implementation_autoset
            _attn_implementation_internal experts_implementation _experts_implementation
            transformers.js_config pretraining_tp base_model_tp_plan base_model_pp_plan
            base_model_fsdp_plan""",
        "for training with transformers": """
            initializer_range initializer_factor attention_dropout gradient_checkpointing loss_type
            keys_to_ignore_at_inference""",
        "ids of the tokenizer, no part of the model": """
            bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id cls_token_id
            mask_token_id tokenizer_class prefix""",
        "how to generate, which generation_config.json says": """
            bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
            encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
            forced_eos_token_id length_penalty max_length max_new_tokens min_length
            no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
            remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
            temperature top_k top_p typical_p""",
        "of tasks with another head, whose tensors would be refused": """
            id2label label2id num_labels finetuning_task problem_type task_specific_params""",
        "of encoders and decoders, which Gemma's classes never ask for": """
            is_decoder tie_encoder_decoder cross_attention_hidden_size decoder_start_token_id
            tf_legacy_loss""",
    }.items()
    for key in keys.split()
}  # fmt: skip

# The same, of one kind of object alone.
UNREAD_OF: Mapping[str, Mapping[str, str]] = {
    "gemma2": {"sliding_window_size": "an old name; transformers reads sliding_window"},
    "gemma3_text": {"attn_logit_softcapping": "Gemma3Attention never applies it"},
    "gemma3n_text": {
        "attn_logit_softcapping": "Gemma3nTextAttention never applies it",
        "query_pre_attn_scalar": "Gemma3nTextAttention leaves the scale to its norms",
    },
    "gemma4_text": dict.fromkeys(
        ("num_experts", "top_k_experts", "moe_intermediate_size"),
        "of mixtures of experts, which enable_moe_block would ask for",
    ),
    "gemma4": dict.fromkeys(
        "boi_token_id eoi_token_id image_token_id video_token_id boa_token_id eoa_token_id "
        "eoa_token_index audio_token_id vision_soft_tokens_per_image".split(),
        "of images, sounds and videos, which only models with towers read",
    ),
    "siglip_vision_model": {"tie_word_embeddings": "a tower has no words"},
    "gemma3n_vision": {
        "do_pooling": "Gemma3nModel asks the tower for places, not for their mean",
        "num_classes": "of a classifier, which the tower is built without",
        "label_names": "of a classifier, which the tower is built without",
        "pretrained_cfg": "where timm would find weights",
        "tie_word_embeddings": "a tower has no words",
    },
    "gemma3n_audio": {
        "conf_attention_chunk_size": "how queries are grouped; which keys one sees does not change",
        "conf_attention_invalid_logits_value": "of keys that are not seen, whatever it is",
        "conf_positional_bias_size": "an old name; transformers reads the contexts",
        "sscp_conv_eps": "an old name; transformers reads sscp_conv_group_norm_eps",
        "tie_word_embeddings": "a tower has no words",
    },
}

UNSET: Mapping[str, tuple[object, ...]] = {
    "attention_bias": (None, False),
    "quantization_config": (None, {}),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "pruned_heads": (None, {}),
}
ROPE = "rope_type type rope_theta factor partial_rotary_factor".split()
UNREAD_ROPE = {"original_max_position_embeddings": "of kinds of rope that are refused"}
LAYER_TYPES = ("full_attention", "sliding_attention")
_TEXT = {
    "gemma3": "gemma3_text",
    "shieldgemma2": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
}

# Modality -> where its tower lies, and of which kind it is by the model's.
_TOWERS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "image": (
        "vision_config",
        {
            "gemma3": "siglip_vision_model",
            "shieldgemma2": "siglip_vision_model",
            "gemma3n": "gemma3n_vision",
        },
    ),
    "audio": ("audio_config", {"gemma3n": "gemma3n_audio"}),
}


def refuse_unknown_keys(raw: Json, modalities: Collection[str]) -> None:
    """Raises `ValueError` for the keys of a `config.json` that have no fate here, with all of them.

    Args:
      modalities: Those beside text of which it counts what it says.
    """
    objects = list(_objects(raw, modalities))
    problems = [problem for where, _, obj in objects for problem in _set_switches(where, obj)]
    unknown = [
        where + key
        for where, kind, obj in objects
        for key, value in obj.items()
        if not has_fate(kind, key) and not _is_copy(raw, kind, key, value)
    ]
    unknown += _unknown_ropes(raw)
    if unknown:
        problems.append(
            f"{', '.join(unknown)}: unknown here, and may change what the model computes; remove "
            "what does not"
        )
    if problems:
        raise ValueError("; ".join(problems))


def has_fate(kind: str, key: str) -> bool:
    """Whether a key of an object of this `model_type` is read, unread for a reason, or a switch."""
    return key in READ[kind] or key in UNREAD or key in UNREAD_OF.get(kind, {}) or key in UNSET


def _objects(raw: Json, modalities: Collection[str]) -> Iterator[tuple[str, str, Json]]:
    """`(prefix of its keys, model_type, object)`, but for the towers of other modalities."""
    kind = raw["model_type"]
    yield "", kind, raw
    if kind in _TEXT:
        yield "text_config.", _TEXT[kind], nested(raw, "text_config")
    for modality, (part, towers) in _TOWERS.items():
        if modality in modalities and kind in towers:
            yield f"{part}.", towers[kind], nested(raw, part)


def _set_switches(where: str, obj: Json) -> list[str]:
    return [
        f"{where}{key} is set; only models without it are supported"
        for key, unset in UNSET.items()
        if obj.get(key) not in unset
    ]


def _is_copy(raw: Json, kind: str, key: str, value: object) -> bool:
    """Some programs copy keys of the text config to the outer object; equal ones say nothing."""
    copied = kind in _TEXT and key in READ[_TEXT[kind]]
    return copied and nested(raw, "text_config").get(key, ...) == value


def _unknown_ropes(raw: Json) -> list[str]:
    kind, where = raw["model_type"], "text_config." if raw["model_type"] in _TEXT else ""
    text = nested(raw, "text_config") if where else raw
    ropes = {"rope_scaling": nested(text, "rope_scaling")}
    parameters = nested(text, "rope_parameters")
    unknown = []
    if _TEXT.get(kind, kind) in ("gemma3_text", "gemma3n_text", "gemma4_text"):
        unknown += [f"rope_parameters.{key}" for key in parameters if key not in LAYER_TYPES]
        known = [key for key in LAYER_TYPES if key in parameters]
        ropes |= {f"rope_parameters.{key}": nested(parameters, key) for key in known}
    else:
        ropes["rope_parameters"] = parameters
    unknown += [
        f"{name}.{key}"
        for name, rope in ropes.items()
        for key in rope
        if key not in ROPE and key not in UNREAD_ROPE
    ]
    return [where + key for key in unknown]
