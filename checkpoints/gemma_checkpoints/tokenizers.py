"""Where the tokenizer of a checkpoint lies, and what travels with an export."""

import shutil
from pathlib import Path

from .gguf.header import MAGIC, copy_metadata
from .gguf.parts import first_part

# Preferred first. The last is what exports of a GGUF file carry: its metadata without the weights.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tokenizer.gguf")
COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
    "generation_config.json",
)
PROCESSORS = ("processor_config.json", "preprocessor_config.json")  # of images and sounds


def find_tokenizer(path: Path) -> Path | None:
    """The vocabulary of a checkpoint: in a GGUF file it is the file itself."""
    if path.is_file():
        return first_part(path) if is_gguf(path) else None
    return next((path / name for name in VOCABULARIES if (path / name).is_file()), None)


def copy_companions(source: Path, folder: Path, *, processors: bool) -> None:
    """Puts what the checkpoint `source` has beside its weights into `folder`.

    That is the tokenizer, and with `processors` the settings of those of images and sounds.
    """
    if source.is_file() and is_gguf(source):
        copy_metadata(first_part(source), folder / VOCABULARIES[-1])
        return
    for name in (*VOCABULARIES, *COMPANIONS, *(PROCESSORS if processors else ())):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def is_gguf(path: Path) -> bool:
    """By its first bytes, not its name."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC
