"""A model and its tokenizer as a folder that `load` takes."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import jax

from gemma_jax.atomic_files import replacing
from gemma_jax.decoder.model import Gemma
from gemma_jax.loading import load_tokenizer
from gemma_jax.storages import one_of
from gemma_jax.text import Tokenizer

FORMATS = ("orbax", "hf")
GENERATION = "generation_config.json"


def save(
    model: Gemma,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    *,
    format: Literal["orbax", "hf"] = "orbax",
) -> Path:
    """Saves a model with its tokenizer as a new folder: `gemma_jax.load(folder)` has both again.

    Args:
      tokenizer: Its files go along, with what lies beside them: chat template, settings of images'
        processor. Ids that end an answer are those of the tokenizer, whoever set them. With `None`
        only `load_model` can read the folder.
      folder: Must not exist, or be empty. It appears whole or not at all.
      format: `"orbax"` keeps every model of this library; `"hf"`, a folder for transformers, those
        that transformers has a class for.

    Raises:
      ValueError: The folder is taken or cannot be written, or the model is more than this format
        can say.

    Examples:
      >>> import gemma_jax as gj
      >>> import tempfile
      >>> model, tok = gj.load("checkpoints/digits")
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     again, tok = gj.load(gj.save(model, tok, f"{folder}/mine"))
      >>> again.cfg == model.cfg
      True
    """
    from gemma_checkpoints import save_hf, save_orbax

    if format not in FORMATS:
        raise ValueError(f"{format=} must be {one_of(FORMATS)}")
    write = save_hf if format == "hf" else save_orbax
    if tokenizer is None:
        return write(model, folder)
    with _files(tokenizer) as source:
        saved = write(model, folder, source=source)
    if jax.process_index() == 0:
        _keep_stop_ids(saved, tokenizer)
    return saved


@contextmanager
def _files(tokenizer: Tokenizer) -> Iterator[Path]:
    """A checkpoint's folder, or GGUF file, that has this tokenizer."""
    from gemma_checkpoints.tokenizers import VOCABULARIES, is_gguf

    path = tokenizer.path
    if path is not None and path.is_file():
        if path.name in VOCABULARIES:
            yield path.parent
            return
        if is_gguf(path):
            yield path
            return
    with tempfile.TemporaryDirectory() as folder:  # a file by another name, or never a file
        if path is None:
            (Path(folder) / "tokenizer.model").write_bytes(tokenizer.to_sentencepiece_bytes())
        else:
            kind = "json" if path.read_bytes()[:1] == b"{" else "model"
            shutil.copyfile(path, Path(folder) / f"tokenizer.{kind}")
        yield Path(folder)


def _keep_stop_ids(folder: Path, tokenizer: Tokenizer) -> None:
    """States them where neither the vocabulary nor a file beside it says the same."""
    if load_tokenizer(folder).stop_ids == tokenizer.stop_ids:
        return
    path = folder / GENERATION
    said = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    said["eos_token_id"] = list(tokenizer.stop_ids)
    with replacing(path) as part:
        part.write_text(json.dumps(said, indent=2) + "\n", "utf-8")
