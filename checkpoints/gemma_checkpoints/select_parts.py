"""Which parts of a checkpoint to load, by what they are for."""

from collections.abc import Collection
from dataclasses import replace

from gemma_jax.config import GemmaConfig

from .errors import CheckpointError
from .source import Source

MODALITIES = ("text", "image")


def config_for(source: Source, modalities: Collection[str] | None) -> GemmaConfig:
    """The config of `source` without what `modalities` leave out.

    Args:
      modalities: Names out of `MODALITIES`, `"text"` among them. `None`: all that `source` has.

    Raises:
      CheckpointError: the source has no weights for one of them.
      ValueError: unknown names, or no `"text"`.
    """
    if modalities is None:
        return _with_images(source)
    wanted = {modalities} if isinstance(modalities, str) else set(modalities)
    if unknown := sorted(map(str, wanted - set(MODALITIES))):
        raise ValueError(
            f"unknown modality {', '.join(unknown)}; choose from {', '.join(MODALITIES)}"
        )
    if "text" not in wanted:
        raise ValueError(
            f"modalities={sorted(wanted)} must hold 'text': the decoder is always needed"
        )
    if "image" not in wanted:
        return replace(source.config, vision=None, modality_vocabularies=())
    if _with_images(source).vision is None:
        raise CheckpointError(source.path, _no_images(source))
    return source.config


def _with_images(source: Source) -> GemmaConfig:
    """All that the source has.

    Raises:
      CheckpointError: it ought to have images, and says nothing sound of them.
    """
    if "image" in source.spoilt:
        raise CheckpointError(
            source.path, f'{source.spoilt["image"]}; modalities=("text",) does without'
        )
    return source.config


def _no_images(source: Source) -> str:
    """In a GGUF file's case the model may see, its file does not."""
    if source.format == "GGUF":
        return (
            "a GGUF file holds the text decoder alone; images need its tower, mmproj=FILE, or the "
            "Hugging Face folder"
        )
    return "this model reads text alone: it has no vision tower; leave 'image' out of modalities"
