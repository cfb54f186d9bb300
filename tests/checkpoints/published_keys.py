"""Names of keys that published checkpoints hold, for the walk over their fates.

From `config.json` of the repositories named, from the fields of the classes of transformers 4.50.0
and 5.24.0 (`configuration_utils.py`, `configuration_{gemma,gemma2,gemma3,gemma3n,siglip}.py`), and
from the headers that `conversion/gemma.py` of llama.cpp writes (November 2026).
"""

_FIELDS = """
    architectures attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_size
    initializer_range intermediate_size max_position_embeddings model_type num_attention_heads
    num_hidden_layers num_key_value_heads pad_token_id rms_norm_eps torch_dtype
    transformers_version use_cache vocab_size
"""
_GEMMA2 = """
    attn_logit_softcapping cache_implementation final_logit_softcapping hidden_act
    hidden_activation query_pre_attn_scalar rope_theta sliding_window
"""
_GEMMA3 = """
    attn_logit_softcapping cache_implementation final_logit_softcapping hidden_activation
    query_pre_attn_scalar rope_local_base_freq rope_scaling rope_theta sliding_window
"""
_GEMMA3N = """
    activation_sparsity_pattern altup_active_idx altup_coef_clip altup_correct_scale
    altup_num_inputs final_logit_softcapping hidden_activation hidden_size_per_layer_input
    laurel_rank layer_types num_kv_shared_layers query_pre_attn_scalar rope_local_base_freq
    rope_scaling rope_theta sliding_window vocab_size_per_layer_input
"""
_OUTER = """
    architectures boi_token_index eoi_token_index eos_token_id image_token_index initializer_range
    mm_tokens_per_image model_type text_config torch_dtype transformers_version vision_config
"""
_V5 = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings initializer_range rms_norm_eps use_cache
    pad_token_id eos_token_id bos_token_id tie_word_embeddings rope_parameters attention_bias
    attention_dropout model_type architectures dtype transformers_version
"""
_V5_WINDOWS = "hidden_activation sliding_window layer_types final_logit_softcapping"
_V5_TEXT3 = "query_pre_attn_scalar attn_logit_softcapping use_bidirectional_attention"
# `PretrainedConfig` of 4.50 wrote all of this into configs inside of others.
V4_INNER = """
    _attn_implementation_autoset _name_or_path add_cross_attention architectures bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype torchscript
    typical_p use_bfloat16
"""
_PEOPLE = "unsloth_version unsloth_fixed name_or_path _attn_implementation quantization_config"

# (where, kind of object) -> keys
CONFIG_KEYS = {
    ("google/gemma-2b", "gemma"): _FIELDS + "hidden_act hidden_activation rope_scaling rope_theta",
    ("google/gemma-2-27b", "gemma2"): _FIELDS + _GEMMA2 + "sliding_window_size",
    ("google/gemma-2-2b-it", "gemma2"): _FIELDS + _GEMMA2,
    ("google/shieldgemma-2b", "gemma2"): _FIELDS + _GEMMA2,
    ("google/gemma-3-1b-it", "gemma3_text"): _FIELDS + _GEMMA3 + "sliding_window_pattern",
    ("google/gemma-3-270m", "gemma3_text"): _FIELDS + _GEMMA3
    + "_sliding_window_pattern layer_types use_bidirectional_attention",
    ("google/embeddinggemma-300m", "gemma3_text"): _FIELDS + _GEMMA3
    + "_sliding_window_pattern layer_types use_bidirectional_attention dtype",
    ("google/gemma-3-27b-it", "gemma3"): _OUTER,
    ("google/gemma-3-27b-it, text", "gemma3_text"): """
        head_dim hidden_size intermediate_size model_type num_attention_heads num_hidden_layers
        num_key_value_heads query_pre_attn_scalar rope_scaling sliding_window""",
    ("google/gemma-3-4b-it, vision", "siglip_vision_model"): """
        hidden_size image_size intermediate_size model_type num_attention_heads num_hidden_layers
        patch_size vision_use_head""",
    ("google/shieldgemma-2-4b-it", "shieldgemma2"): _OUTER,
    ("google/gemma-3n-E4B-it", "gemma3n"): """
        architectures audio_config audio_soft_tokens_per_image audio_token_id boa_token_id
        boi_token_id eoa_token_id eoi_token_id eos_token_id image_token_id initializer_range
        model_type text_config torch_dtype transformers_version vision_config
        vision_soft_tokens_per_image""",
    ("google/gemma-3n-E4B-it, text", "gemma3n_text"): _FIELDS + _GEMMA3N,
    ("google/gemma-3n-E4B-it, vision", "gemma3n_vision"): """
        architecture do_pooling hidden_size initializer_range label_names model_args model_type
        num_classes rms_norm_eps torch_dtype vocab_offset vocab_size""",
    ("google/gemma-3n-E4B-it, audio", "gemma3n_audio"): """
        conf_attention_chunk_size conf_attention_context_left conf_attention_context_right
        conf_attention_invalid_logits_value conf_attention_logit_cap conf_conv_kernel_size
        conf_num_attention_heads conf_num_hidden_layers conf_positional_bias_size
        conf_reduction_factor conf_residual_weight gradient_clipping hidden_size input_feat_size
        model_type rms_norm_eps sscp_conv_channel_size sscp_conv_eps sscp_conv_group_norm_eps
        sscp_conv_kernel_size sscp_conv_stride_size torch_dtype vocab_offset vocab_size""",
    ("GemmaConfig of transformers 5.24", "gemma"): _V5 + "hidden_act use_bidirectional_attention",
    ("Gemma2Config of transformers 5.24", "gemma2"): _V5 + _V5_WINDOWS + " " + _V5_TEXT3,
    ("Gemma3TextConfig of transformers 5.24", "gemma3_text"): _V5 + _V5_WINDOWS + " " + _V5_TEXT3,
    ("Gemma3Config of transformers 5.24", "gemma3"): _OUTER + "dtype tie_word_embeddings",
    ("Gemma3nTextConfig of transformers 5.24", "gemma3n_text"): _V5 + _V5_WINDOWS + """
        vocab_size_per_layer_input hidden_size_per_layer_input altup_active_idx altup_coef_clip
        altup_correct_scale altup_num_inputs num_kv_shared_layers laurel_rank
        activation_sparsity_pattern""",
    ("Gemma4TextConfig of transformers 5.24", "gemma4_text"): """
        architectures attention_bias attention_dropout attention_k_eq_v bos_token_id dtype
        enable_moe_block eos_token_id final_logit_softcapping head_dim hidden_activation hidden_size
        hidden_size_per_layer_input initializer_range intermediate_size layer_types
        max_position_embeddings model_type moe_intermediate_size num_attention_heads num_experts
        num_hidden_layers num_key_value_heads num_kv_shared_layers pad_token_id per_layer_config
        rms_norm_eps rope_parameters sliding_window tie_word_embeddings top_k_experts
        transformers_version use_bidirectional_attention use_cache use_double_wide_mlp vocab_size
        vocab_size_per_layer_input""",
    ("Gemma4Config of transformers 5.24", "gemma4"): """
        architectures audio_config audio_token_id boa_token_id boi_token_id dtype eoa_token_index
        eoi_token_id image_token_id initializer_range model_type text_config tie_word_embeddings
        transformers_version video_token_id vision_config""",
    ("SiglipVisionConfig of transformers 5.24", "siglip_vision_model"): """
        hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels image_size
        patch_size hidden_act layer_norm_eps attention_dropout vision_use_head dtype model_type""",
    **{
        (f"PretrainedConfig of transformers 4.50, {kind}", kind): V4_INNER + _PEOPLE
        for kind in (
            "gemma", "gemma2", "gemma3_text", "gemma3n_text", "siglip_vision_model",
            "gemma3n_vision", "gemma3n_audio",
        )
    },
}  # fmt: skip

_GENERAL = """
    general.architecture general.type general.name general.basename general.finetune
    general.size_label general.license general.license.name general.license.link
    general.base_model.count general.base_model.0.name general.base_model.0.organization
    general.base_model.0.repo_url general.tags general.languages general.file_type
    general.quantization_version general.alignment general.quantized_by general.url
    general.sampling.top_k general.sampling.top_p general.sampling.temp general.parameter_count
    tokenizer.ggml.model tokenizer.ggml.pre tokenizer.ggml.tokens tokenizer.ggml.scores
    tokenizer.ggml.token_type tokenizer.ggml.merges tokenizer.ggml.bos_token_id
    tokenizer.ggml.eos_token_id tokenizer.ggml.eot_token_id tokenizer.ggml.unknown_token_id
    tokenizer.ggml.padding_token_id tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token
    tokenizer.ggml.add_sep_token tokenizer.ggml.add_space_prefix tokenizer.chat_template
    tokenizer.chat_templates tokenizer.ggml.prefix_token_id tokenizer.ggml.suffix_token_id
    tokenizer.ggml.middle_token_id tokenizer.ggml.fim_pre_token_id
    quantize.imatrix.file quantize.imatrix.dataset quantize.imatrix.entries_count
    quantize.imatrix.chunks_count split.no split.count split.tensors.count
    mradermacher.quantize_version mradermacher.quantized_by mradermacher.quantized_at
    mradermacher.convert_type
"""
_DECODER = """
    context_length embedding_length block_count feed_forward_length attention.head_count
    attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length
    attention.value_length
"""
_WINDOWS = "attention.sliding_window final_logit_softcapping"
# architecture -> keys after its name, as the converters of 2024 to 2026 write them
GGUF_KEYS = {
    "gemma": _DECODER,
    "gemma2": _DECODER + _WINDOWS + " attn_logit_softcapping rope.freq_base",
    "gemma3": _DECODER + _WINDOWS + """ rope.freq_base rope.freq_base_swa rope.scaling.type
        rope.scaling.factor rope.dimension_count attention.sliding_window_pattern vocab_size""",
    "gemma3n": _DECODER + _WINDOWS + """ rope.freq_base rope.freq_base_swa altup.active_idx
        altup.num_inputs embedding_length_per_layer_input attention.shared_kv_layers
        activation_sparsity_scale attention.sliding_window_pattern vocab_size""",
}  # fmt: skip
GENERAL_KEYS = _GENERAL.split()
