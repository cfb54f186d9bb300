"""`TextEmbeddingConfig` -> the JSON files of a sentence-transformers folder, spelt as published
ones are, which all releases read."""

import json
from pathlib import Path

from gemma_jax.config import GemmaConfig
from gemma_jax.text_embedding_config import TextEmbeddingConfig

from ..json_values import Json
from .sentence_folder import (
    CONFIG,
    FILES,
    IDENTITY,
    LONGEST,
    MODES,
    MODULES,
    PACKAGE,
    PROMPTS,
    module_folders,
    read_sentence_folder,
)

POOLING = "1_Pooling"


def sentence_files(cfg: GemmaConfig, source: Path | None) -> tuple[dict[str, bytes], list[str]]:
    """Path in the folder -> content, but for weights; and the folder of each dense layer.

    Args:
      cfg: Of a model with such a head.
      source: A folder whose own files are taken, byte for byte, if they say the same.
    """
    head = cfg.text_embedding
    if source is not None and source.is_dir():
        found = read_sentence_folder(source, cfg.d_model)
        if found is not None and found[0] == head:
            places = [f"{place}/{CONFIG}" for place in module_folders(source)[1:]]
            own = [name for name in (*FILES, *places) if (source / name).is_file()]
            return {name: (source / name).read_bytes() for name in own}, [x.name for x in found[1]]
    dense = [f"{i}_Dense" for i in range(2, 2 + len(head.dense))]
    contents = {
        MODULES: _modules(head, dense),
        PROMPTS: {
            "prompts": dict(head.prompts),
            "default_prompt_name": head.default_prompt,
            "similarity_fn_name": "cosine",
        },
        LONGEST: {"max_seq_length": head.max_tokens, "do_lower_case": False},
        f"{POOLING}/{CONFIG}": {
            "word_embedding_dimension": cfg.d_model,
            **{f"pooling_mode_{mode}": mode == "mean_tokens" for mode in MODES},
            "include_prompt": True,
        },
    }
    for place, inputs, outputs in zip(dense, (cfg.d_model, *head.dense), head.dense):
        contents[f"{place}/{CONFIG}"] = {
            "in_features": inputs,
            "out_features": outputs,
            "bias": False,
            "activation_function": IDENTITY,
        }
    texts = {name: json.dumps(one, indent=2, ensure_ascii=False) for name, one in contents.items()}
    return {name: f"{text}\n".encode() for name, text in texts.items()}, dense


def _modules(head: TextEmbeddingConfig, dense: list[str]) -> list[Json]:
    modules = [("", "Transformer"), (POOLING, "Pooling"), *((place, "Dense") for place in dense)]
    if head.normalise:
        modules.append((f"{len(modules)}_Normalize", "Normalize"))
    return [
        {"idx": i, "name": str(i), "path": place, "type": f"{PACKAGE}models.{kind}"}
        for i, (place, kind) in enumerate(modules)
    ]
