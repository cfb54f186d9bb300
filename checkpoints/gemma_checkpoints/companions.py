"""The files beside the weights of a Hugging Face folder: each is used, irrelevant, or refused."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path

from .errors import CheckpointError

USED = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.gguf",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
)
# Pattern -> why it changes nothing of what the model says.
IRRELEVANT: Mapping[str, str] = {
    ".*": "hidden: of a version control, a download or an editor",
    "*.md": "for people",
    "*.txt": "for people, or merges that tokenizer.json repeats",
    "*.rst": "for people",
    "*.pdf": "for people",
    "*.html": "for people",
    "LICENSE*": "for people",
    "NOTICE*": "for people",
    "*.png": "a picture",
    "*.jpg": "a picture",
    "*.jpeg": "a picture",
    "*.gif": "a picture",
    "*.svg": "a picture",
    "*.webp": "a picture",
    "*.bin": "weights or training state as pickles; the safetensors files hold the weights",
    "*.pt": "as *.bin",
    "*.pth": "as *.bin",
    "*.ckpt": "as *.bin",
    "*.h5": "the weights once more, for another framework",
    "*.msgpack": "as *.h5",
    "*.onnx": "as *.h5",
    "*.onnx_data": "as *.h5",
    "*.tflite": "as *.h5",
    "*.task": "as *.h5",
    "*.litertlm": "as *.h5",
    "*.gguf": "the weights once more; give the file itself to load it",
    "*.bin.index.json": "where pickled weights lie",
    "*.py": "code, which is never run; config.json would have to name it",
    "*.ipynb": "code, which is never run",
    "*.sh": "code, which is never run",
    "*.yaml": "how training or serving was set up",
    "*.yml": "as *.yaml",
    "*.toml": "as *.yaml",
    "*.csv": "records",
    "*.tsv": "records",
    "*.jsonl": "records",
    "*.log": "records",
    "events.out.tfevents*": "records",
    "*results.json": "measured results",
    "*_metrics.json": "measured results",
    "trainer_state.json": "the state of a training",
    "training_args.json": "how training was set up",
    "training_params.json": "how training was set up",
    "dataset_info*.json": "what it was trained on",
    "vocab.json": "tokenizer.json or tokenizer.model holds the vocabulary",
    "onnx_config.json": "as *.h5",
    "*.sha256": "checksums",
    "*.md5": "checksums",
    "latest": "which training state is the newest",
    "*": "transformers reads no file of this name: no part of the model",
}
# What changes the model, and is not read here -> what to do.
REFUSED: Mapping[str, str] = {
    "adapter_config.json": "an adapter (LoRA) belongs to the weights; merge it into them first",
    "adapter_model.*": "an adapter (LoRA) belongs to the weights; merge it into them first",
    "non_lora_trainables.bin": "an adapter (LoRA) belongs to the weights; merge it into them first",
    "quantize_config.json": "weights quantised by GPTQ are not read; use plain ones or GGUF",
    "quant_config.json": "weights quantised by AWQ are not read; use plain ones or GGUF",
    "hf_quant_config.json": "weights quantised by ModelOpt are not read; use plain ones or GGUF",
}


def fate(name: str) -> str:
    """`"used"`, why a file of this name is irrelevant, or what it takes to do without it."""
    if name_in(name, REFUSED):
        return next(advice for pattern, advice in REFUSED.items() if fnmatch(name, pattern))
    if name_in(name, USED):
        return "used"
    return next(reason for pattern, reason in IRRELEVANT.items() if fnmatch(name, pattern))


def name_in(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def check_companions(folder: Path) -> None:
    """Raises `CheckpointError` with the files that change the model and are not read.

    Folders inside are not looked into: transformers reads none but alternative chat templates.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if problems := [f"{name}: {fate(name)}" for name in names if name_in(name, REFUSED)]:
        raise CheckpointError(folder, problems)
