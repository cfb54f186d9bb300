"""`generation_config.json`: where an answer ends, and how to choose tokens unless told otherwise.

Source of the keys and their defaults: `generation/configuration_utils.py` of transformers 5.24.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_jax.inference.sampling import Sampling

from .errors import CheckpointError
from .gguf.header import read_gguf_header
from .gguf.sampling import sampling_from_gguf
from .hf.folder import CONFIG
from .json_values import Json, read_json
from .tokenizers import VOCABULARIES, find_tokenizer

GENERATION = "generation_config.json"
# Key of ours -> key of theirs, and what transformers takes where `do_sample` is set without it.
SAMPLING: Mapping[str, tuple[str, float]] = {
    "temperature": ("temperature", 1.0),
    "top_k": ("top_k", 50),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repetition_penalty", 1.0),
}
USED = frozenset({"eos_token_id", "do_sample", *(theirs for theirs, _ in SAMPLING.values())})
# Key -> why it changes no token here.
IRRELEVANT: Mapping[str, str] = {
    **dict.fromkeys(
        ("bos_token_id", "pad_token_id", "decoder_start_token_id"),
        "the tokenizer says how a prompt begins, and rows are padded by position",
    ),
    **dict.fromkeys(
        ("max_length", "max_new_tokens", "max_time"),
        "a bound, which the caller sets: --max-new-tokens",
    ),
    **dict.fromkeys(
        ("cache_implementation", "cache_config", "use_cache", "disable_compile", "compile_config",
         "prefill_chunk_size", "low_memory", "continuous_batching_config", "max_cache_len"),
        "how transformers computes, not what",
    ),
    **dict.fromkeys(
        ("transformers_version", "_from_model_config", "generation_kwargs", "trust_remote_code",
         "_commit_hash", "use_model_defaults"),
        "how the file came about",
    ),
    **dict.fromkeys(
        ("return_dict_in_generate", "output_attentions", "output_hidden_states", "output_logits",
         "output_scores", "return_legacy_cache"),
        "what else transformers returns",
    ),
    **dict.fromkeys(
        ("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty"),
        "about beams, and num_beams is 1 or refused",
    ),
    **dict.fromkeys(
        ("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
         "assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind",
         "target_lookbehind", "prompt_lookup_num_tokens", "max_matching_ngram_size",
         "assistant_ensemble_weight", "speculation_type", "use_mtp"),
        "about drafts, which do not change what a model says",
    ),
}  # fmt: skip
# Key -> values besides null that change nothing; any other is refused.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "top_h": (),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "guidance_scale": (1,),
    "renormalize_logits": (False, True),  # scales all probabilities alike
    "remove_invalid_values": (False, True),  # there are none
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "constraints": ([],),
    "sequence_bias": ({}, []),
    "exponential_decay_length_penalty": (),
    "stop_strings": ([],),
    "token_healing": (False,),
    "watermarking_config": (),
}


@dataclass(frozen=True)
class GenerationDefaults:
    """Holds what a checkpoint says of the texts that its model writes.

    Attributes:
      stop_ids: Tokens that end an answer; `None` where it leaves them to the tokenizer.
      stop_ids_from: The file that says so.
      sampling: How to choose tokens; `None` where it says nothing.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.GenerationDefaults(stop_ids=(1, 106)).sampling is None
      True
    """

    stop_ids: tuple[int, ...] | None = None
    stop_ids_from: str | None = None
    sampling: Sampling | None = None


def generation_defaults(path: str | Path) -> GenerationDefaults:
    """Reads what a checkpoint says of the texts that its model writes.

    That is `stated_in_json`, and without a `generation_config.json` the sampling in the header of a
    GGUF file, or of an export of one; its tokenizer knows the stop ids.

    Raises:
      CheckpointError: A broken file, or one that asks for what this library does not do.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.generation_defaults("checkpoints/digits").sampling is None
      True
    """
    found = stated_in_json(path)
    if (Path(path) / GENERATION).is_file():
        return found
    return replace(found, sampling=_gguf_sampling(Path(path)))


def stated_in_json(path: str | Path) -> GenerationDefaults:
    """Reads `generation_config.json`, and the stop ids of `config.json` where it is missing.

    No header of a GGUF file is read for it, which takes a tenth of a second.

    Raises:
      CheckpointError: A broken file, or one that asks for what this library does not do.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.stated_in_json("checkpoints/digits").stop_ids_from
      'config.json'
    """
    path = Path(path)
    if (path / GENERATION).is_file():
        raw, where = read_json(path / GENERATION), path / GENERATION
    elif (path / CONFIG).is_file():
        config = read_json(path / CONFIG)
        inner = config.get("text_config")
        inner = inner if isinstance(inner, dict) else {}
        eos = config.get("eos_token_id", inner.get("eos_token_id"))
        raw, where = {"eos_token_id": eos}, path / CONFIG
    else:
        return GenerationDefaults()
    try:
        _refuse(raw)
        stop_ids, sampling = _stop_ids(raw.get("eos_token_id")), _sampling(raw)
    except ValueError as error:
        raise CheckpointError(where, str(error)) from None
    return GenerationDefaults(stop_ids, where.name if stop_ids else None, sampling)


def _gguf_sampling(path: Path) -> Sampling | None:
    """What the header says that a checkpoint is, or carries as its tokenizer."""
    header = find_tokenizer(path)
    if header is None or (path.is_dir() and header.name != VOCABULARIES[-1]):
        return None
    try:
        return sampling_from_gguf(read_gguf_header(header).metadata)
    except ValueError as error:
        raise CheckpointError(header, str(error)) from None


def _refuse(raw: Json) -> None:
    for key, value in raw.items():
        if value is None or key in USED or key in IRRELEVANT:
            continue
        if key not in NEUTRAL:
            raise ValueError(f"{key!r} is not known here: it may change what the model says")
        if value not in NEUTRAL[key]:
            raise ValueError(f"{key} is {value!r:.80}, which is not supported; remove it")


def _stop_ids(value: object) -> tuple[int, ...] | None:
    if value is None or value == []:
        return None
    ids = value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise ValueError(f"eos_token_id must be an id or a list of ids, got {value!r:.80}")
    return tuple(sorted(set(ids)))


def _sampling(raw: Json) -> Sampling | None:
    """With `do_sample`, what is missing is as in transformers; without it, what is there counts."""
    stored = {ours: raw.get(theirs) for ours, (theirs, _) in SAMPLING.items()}
    given = {name: value for name, value in stored.items() if value is not None}
    sample = raw.get("do_sample")
    if not isinstance(sample, bool | None):
        raise ValueError(f"do_sample must be true or false, got {sample!r:.80}")
    for name, value in given.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{name} must be a number, got {value!r:.80}")
    if sample is None and not given:
        return None
    if sample is False:
        return Sampling(repetition_penalty=given.get("repetition_penalty", 1.0))
    return Sampling(**{name: default for name, (_, default) in SAMPLING.items()} | given)
