"""Which parts of a checkpoint to load, by what they are for."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from gemma_jax.config import GemmaConfig

from .errors import CheckpointError
from .source import Source

MODALITIES = ("text", "image", "audio")
# Modality -> the field of the config that has its tower, what that has the placeholder in, and what
# a tower is called.
TOWERS: Mapping[str, tuple[str, str, str]] = {
    "image": ("vision", "image_token", "vision tower"),
    "audio": ("audio", "audio_token", "audio tower"),
}


def config_for(source: Source, modalities: Collection[str] | None) -> GemmaConfig:
    """The config of `source` without what `modalities` leave out.

    A vocabulary of Gemma 3n stays with its modality.

    Args:
      modalities: Names out of `MODALITIES`, `"text"` among them. `None`: all that `source` has.

    Raises:
      CheckpointError: the source has no weights for one of them.
      ValueError: unknown names, or no `"text"`.
    """
    if modalities is None:
        _refuse_spoilt(source, TOWERS)
        return source.config
    wanted = {modalities} if isinstance(modalities, str) else set(modalities)
    if unknown := sorted(map(str, wanted - set(MODALITIES))):
        raise ValueError(
            f"unknown modality {', '.join(unknown)}; choose from {', '.join(MODALITIES)}"
        )
    if "text" not in wanted:
        raise ValueError(
            f"modalities={sorted(wanted)} must hold 'text': the decoder is always needed"
        )
    _refuse_spoilt(source, wanted)
    for modality, (field, _, _) in TOWERS.items():
        if modality in wanted and getattr(source.config, field) is None:
            raise CheckpointError(source.path, _without_tower(source, modality))
    return _only(source.config, wanted)


def _only(cfg: GemmaConfig, wanted: Collection[str]) -> GemmaConfig:
    towers = {
        field: getattr(cfg, field) if modality in wanted else None
        for modality, (field, _, _) in TOWERS.items()
    }
    kept = {
        cfg.vocabulary_of(getattr(towers[field], token))
        for field, token, _ in TOWERS.values()
        if towers[field] is not None
    }
    vocabularies = tuple(ids for i, ids in enumerate(cfg.modality_vocabularies) if i in kept)
    return replace(cfg, **towers, modality_vocabularies=vocabularies)


def _refuse_spoilt(source: Source, wanted: Collection[str]) -> None:
    """Raises `CheckpointError` if the source says nothing sound of something that is wanted."""
    spoilt = [modality for modality in TOWERS if modality in wanted and modality in source.spoilt]
    if not spoilt:
        return
    left = [one for one in MODALITIES if one not in source.spoilt and _has(source.config, one)]
    reasons = "; ".join(dict.fromkeys(source.spoilt[modality] for modality in spoilt))
    # As Python would write it.
    raise CheckpointError(source.path, f"{reasons}; modalities={_tuple(left)} does without")


def _tuple(names: list[str]) -> str:
    quoted = [f'"{name}"' for name in names]
    return f"({', '.join(quoted)}{',' * (len(quoted) == 1)})"


def _has(cfg: GemmaConfig, modality: str) -> bool:
    return modality == "text" or getattr(cfg, TOWERS[modality][0]) is not None


def _without_tower(source: Source, modality: str) -> str:
    """In a GGUF file's case the model may see or hear, its file does not."""
    tower = TOWERS[modality][2]
    if source.format == "GGUF" and modality == "image":
        return (
            "a GGUF file holds the text decoder alone; images need its tower, mmproj=FILE, or the "
            "Hugging Face folder"
        )
    if source.format == "GGUF":
        return "a GGUF file holds the text decoder alone; sounds need the Hugging Face folder"
    reads = [one for one in MODALITIES if _has(source.config, one)]
    reads = "text alone" if len(reads) == 1 else " and ".join(reads)
    return f"this model reads {reads}: it has no {tower}; leave {modality!r} out of modalities"
