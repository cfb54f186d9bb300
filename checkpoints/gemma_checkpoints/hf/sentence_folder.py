"""A sentence-transformers folder: what stands beside the decoder to make one vector of a text.

    modules.json                        which modules, in which order, in which folders
    1_Pooling/config.json               the mean over tokens
    2_Dense/, 3_Dense/, ...             config.json and model.safetensors with `linear.weight`
    config_sentence_transformers.json   prompts by task
    sentence_bert_config.json           the longest text

Both spellings are read, that of 5.1, which published files have, and that of 6.2. What the files
say is used, changes nothing for a reason that stands here, or is refused by name.
Source: `Pooling`, `Dense`, `Normalize` and `SentenceTransformer` of sentence-transformers 6.2.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_jax.text_embedding_config import TextEmbeddingConfig

from ..errors import CheckpointError
from ..json_values import Json, flag, read_json, whole

MODULES, PROMPTS = "modules.json", "config_sentence_transformers.json"
LONGEST, CONFIG = "sentence_bert_config.json", "config.json"
FILES = (MODULES, PROMPTS, LONGEST)
PACKAGE = "sentence_transformers."
KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
IDENTITY = "torch.nn.modules.linear.Identity"
MODES = (
    "cls_token mean_tokens max_tokens mean_sqrt_len_tokens weightedmean_tokens lasttoken".split()
)

# File -> key -> the values of it that change nothing here; `...` stands for any.
Neutral = Mapping[str, tuple[Any, ...]]
OF_MODULE: Neutral = {"idx": (...,), "name": (...,), "kwargs": (None, [], {})}
OF_POOLING: Neutral = {"include_prompt": (True,)}
OF_DENSE: Neutral = {
    "bias": (False,),
    "activation_function": (IDENTITY,),
    "module_input_name": (None, "sentence_embedding"),
    "module_output_name": (None, "sentence_embedding"),
    "use_residual": (None, False),
}
OF_PROMPTS: Neutral = {
    "__version__": (...,),  # of the libraries that wrote it
    "model_type": (None, "SentenceTransformer"),
    "similarity_fn_name": (...,),  # how vectors are compared, which is up to who has them
    "truncate_dim": (None,),
}
OF_LONGEST: Neutral = {
    "do_lower_case": (None, False),
    "transformer_task": (None, "feature-extraction"),
    "module_output_name": (None, "token_embeddings"),
    "modality_config": (
        None,
        {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    ),
}


def read_sentence_folder(
    folder: Path, d_model: int
) -> tuple[TextEmbeddingConfig, list[Path]] | None:
    """The head that a folder describes, and the folder of each of its dense layers; `None` if it is
    no sentence-transformers folder.

    Args:
      d_model: Width of the decoder.

    Raises:
      CheckpointError: A file that is broken, or says what this library does not do; with its name.
    """
    if not (folder / MODULES).is_file():
        if present := [name for name in FILES if (folder / name).is_file()]:
            raise CheckpointError(folder, f"{present[0]}: {MODULES} is missing beside it")
        return None
    where = folder / MODULES
    try:
        kinds, paths = _modules(where)
        where = folder / paths[1] / CONFIG
        _check_pooling(read_json(where), d_model)
        widths, dense = [d_model], [folder / paths[i] for i in range(2, 2 + kinds.count("Dense"))]
        for one in dense:
            where = one / CONFIG
            widths.append(_dense_outputs(read_json(where), widths[-1]))
        where = folder / LONGEST
        longest = _longest(read_json(where)) if where.is_file() else None
        where = folder / PROMPTS
        said = _prompts(read_json(where)) if where.is_file() else {}
        where = folder
        head = TextEmbeddingConfig(
            dense=tuple(widths[1:]), normalise="Normalize" in kinds, max_tokens=longest, **said
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(where, str(error)) from None
    return head, dense


def module_folders(folder: Path) -> list[str]:
    """Folder of each module, in their order."""
    return _modules(folder / MODULES)[1]


def _modules(path: Path) -> tuple[list[str], list[str]]:
    """Kind and folder of each module."""
    try:
        modules = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise ValueError("expected a list of modules")
    kinds, paths = [], []
    for module in modules:
        _refuse_others(module, {"type", "path"}, OF_MODULE)
        kind, place = str(module.get("type")), module.get("path")
        name = kind.rpartition(".")[2]
        if not kind.startswith(PACKAGE) or name not in KINDS:
            raise ValueError(f"module type {kind!r} is not supported; expected {', '.join(KINDS)}")
        if not isinstance(place, str) or Path(place).name != place or place == "..":
            raise ValueError(f"path {place!r} of a module is no name of a folder in this one")
        kinds.append(name)
        paths.append(place)
    count = kinds.count("Dense")
    wanted = ["Transformer", "Pooling", *["Dense"] * count]
    if kinds not in (wanted, [*wanted, "Normalize"]) or paths[0]:
        raise ValueError(
            f"modules {', '.join(kinds)} are not supported; expected a Transformer in the folder "
            "itself, Pooling, Dense layers, and Normalize at the end"
        )
    return kinds, paths


def _check_pooling(said: Json, d_model: int) -> None:
    modes = said.get("pooling_mode")
    if modes is None:
        modes = [mode for mode in MODES if flag(said, f"pooling_mode_{mode}", default=False)]
        modes = [mode.removesuffix("_tokens") for mode in modes] or ["mean"]
    if modes not in ("mean", ["mean"]):
        raise ValueError(f"pooling_mode {modes!r} is not supported; expected the mean of tokens")
    widths = ("word_embedding_dimension", "embedding_dimension")
    for key in widths:
        if key in said and whole(said, key) != d_model:
            raise ValueError(f"{key} is {said[key]}, but the decoder is {d_model} wide")
    read = {"pooling_mode", *widths, *(f"pooling_mode_{mode}" for mode in MODES)}
    _refuse_others(said, read, OF_POOLING)


def _dense_outputs(said: Json, inputs: int) -> int:
    """Width of what a dense layer makes. A key that is missing means the default of the class, and
    that has a bias and a tanh."""
    said = {"bias": True, "activation_function": "torch.nn.modules.activation.Tanh"} | said
    _refuse_others(said, {"in_features", "out_features"}, OF_DENSE)
    if (found := whole(said, "in_features")) != inputs:
        raise ValueError(f"in_features is {found}, but what comes in is {inputs} wide")
    return whole(said, "out_features")


def _longest(said: Json) -> int | None:
    _refuse_others(said, {"max_seq_length"}, OF_LONGEST)
    return None if said.get("max_seq_length") is None else whole(said, "max_seq_length")


def _prompts(said: Json) -> dict[str, Any]:
    _refuse_others(said, {"prompts", "default_prompt_name"}, OF_PROMPTS)
    prompts, default = said.get("prompts") or {}, said.get("default_prompt_name")
    texts = isinstance(prompts, dict) and all(isinstance(one, str) for one in prompts.values())
    if not texts or not isinstance(default, str | None):
        raise ValueError("prompts must be texts by name, and default_prompt_name one of the names")
    return {"prompts": tuple(prompts.items()), "default_prompt": default}


def _refuse_others(said: Json, read: set[str], neutral: Neutral) -> None:
    """Raises `ValueError` for keys that nobody here knows, and for values that are not neutral."""
    if unknown := [key for key in said if key not in read and key not in neutral]:
        raise ValueError(f"{', '.join(unknown)}: unknown here, and may change the embeddings")
    for key, values in neutral.items():
        if key in said and ... not in values and said[key] not in values:
            raise ValueError(f"{key} {said[key]!r} is not supported; expected {values[-1]!r}")
