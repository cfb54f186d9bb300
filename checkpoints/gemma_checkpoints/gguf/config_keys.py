"""What becomes of every key of a GGUF header: read, passed over for a reason, or refused.

`READ` are the keys `ARCHITECTURE.*` that `config.py` reads, as llama.cpp does. `UNREAD` are keys,
with wildcards, that change nothing here, and why. `UNSET` are keys that llama.cpp reads and that
may only say what is so without them. Any other key is refused by its name.

Sources: `load_hparams` in `src/llama-model.cpp`, `src/models/gemma{,2,3,3n}.cpp` and
`conversion/gemma.py` of llama.cpp (November 2026), `gguf-py/gguf/constants.py` 0.19.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

_DECODER = """
    block_count embedding_length feed_forward_length context_length attention.head_count
    attention.head_count_kv attention.key_length attention.value_length
    attention.layer_norm_rms_epsilon rope.freq_base rope.scaling.type rope.scaling.factor
    rope.scale_linear
"""
_WINDOWS = """
    attention.sliding_window attention.sliding_window_pattern rope.freq_base_swa
    final_logit_softcapping
"""
_GEMMA3N = """
    altup.active_idx altup.num_inputs embedding_length_per_layer_input attention.shared_kv_layers
    activation_sparsity_scale
"""
READ: Mapping[str, frozenset[str]] = {
    "gemma": frozenset(_DECODER.split()),
    "gemma2": frozenset([*_DECODER.split(), *_WINDOWS.split(), "attn_logit_softcapping"]),
    "gemma3": frozenset([*_DECODER.split(), *_WINDOWS.split()]),
    "gemma3n": frozenset([*_DECODER.split(), *_WINDOWS.split(), *_GEMMA3N.split()]),
}

UNREAD: Mapping[str, str] = {
    "general.*": "describes the file; architecture, alignment and sampling are read elsewhere",
    "tokenizer.*": "the tokenizer's: `gemma_jax.text.gguf_config` says what becomes of each",
    "split.*": "of files in parts, which `parts.py` puts together",
    "quantize.imatrix.*": "how the file was quantised",
    "imatrix.*": "how the file was quantised",
    "mradermacher.*": "who quantised the file, and when",
}
# After the architecture's name.
UNREAD_OF_MODEL: Mapping[str, str] = {
    "vocab_size": "the embedding has as many rows",
    "pooling_type": "of embeddings of whole texts, which are not computed here",
    "rope.scaling.finetuned": "llama.cpp keeps it, and computes nothing with it",
    "rope.scaling.original_context_length": "of kinds of rope scaling that are refused",
}
# Values that change nothing; HEAD_DIM and WIDTH stand for those of the model.
HEAD_DIM, WIDTH = "attention.key_length", "embedding_length"
UNSET: Mapping[str, object] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_group_count": 0,
    "expert_group_used_count": 0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.alpha": 0.0,
    "attention.key_length_swa": HEAD_DIM,
    "attention.value_length_swa": HEAD_DIM,
    "rope.dimension_count": HEAD_DIM,
    "rope.dimension_count_swa": HEAD_DIM,
    "embedding_length_out": WIDTH,
}


def has_fate(architecture: str, key: str) -> bool:
    """Whether a key of such a file is read, unread for a reason, or one that may be unset."""
    if key.startswith(f"{architecture}."):
        rest = key.removeprefix(f"{architecture}.")
        return rest in READ[architecture] or rest in UNREAD_OF_MODEL or rest in UNSET
    return any(fnmatchcase(key, pattern) for pattern in UNREAD)


def refuse_unknown_keys(
    metadata: Mapping[str, object], architecture: str, sizes: Mapping[str, int]
) -> None:
    """Raises `ValueError` for the keys of a header that have no fate here, with all of them.

    Args:
      sizes: What `HEAD_DIM` and `WIDTH` are in this model.
    """
    problems = []
    if metadata.get("general.type", "model") != "model":
        problems.append(f"general.type is {metadata['general.type']!r}; expected a 'model'")
    for key, unset in UNSET.items():
        expected = sizes.get(unset, unset) if isinstance(unset, str) else unset
        found = metadata.get(f"{architecture}.{key}", expected)
        if found != expected:
            problems.append(f"{architecture}.{key} is {found!r}; only {expected!r} is supported")
    if unknown := [key for key in metadata if not has_fate(architecture, key)]:
        problems.append(
            f"{', '.join(unknown)}: unknown here, and may change what the model computes; write "
            "the file without what does not"
        )
    if problems:
        raise ValueError("; ".join(problems))
