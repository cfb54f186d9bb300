"""A path -> the source that can read it, by what is there and never by its name."""

from pathlib import Path

from .companions import check_companions
from .errors import CheckpointError
from .source import Source
from .tokenizers import is_gguf

EXPECTED = (
    "expected a .gguf file, a Hugging Face folder (config.json and safetensors), "
    "or a folder that save_orbax wrote"
)


def open_source(path: str | Path, *, mmproj: str | Path | None = None) -> Source:
    """Opens a checkpoint of any format: reads and checks its headers.

    Args:
      mmproj: The file with the vision tower of a GGUF file.

    Raises:
      CheckpointError: nothing is there, it is no checkpoint, or it is a broken one.

    Examples:
      >>> import gemma_checkpoints as gc
      >>> gc.open_source("checkpoints/digits").format
      'Hugging Face'
    """
    path, tower = Path(path), None if mmproj is None else Path(mmproj)
    try:
        for one in filter(None, (path, tower)):
            if not one.exists():
                raise CheckpointError(one, "no such file or folder")
        if path.is_file() and is_gguf(path):
            from .gguf.source import GGUFFile  # each format by itself: they take long to import

            return GGUFFile(path, tower)
        if tower is not None:
            raise CheckpointError(tower, f"mmproj goes with a GGUF file, and {path} is none")
        from .hf.folder import CONFIG, HFFolder
        from .orbax.folder import MANIFEST, OrbaxFolder

        if (path / MANIFEST).is_file():
            return OrbaxFolder(path)
        if (path / CONFIG).is_file():
            check_companions(path)
            return HFFolder(path)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error
    raise no_checkpoint(path)


def is_checkpoint(path: Path) -> bool:
    """Whether a path looks like one, by the file that says so; it may be a broken one."""
    from .hf.folder import CONFIG
    from .orbax.folder import MANIFEST

    marked = any((path / name).is_file() for name in (MANIFEST, CONFIG))
    return marked or (path.is_file() and is_gguf(path))


def no_checkpoint(path: Path) -> CheckpointError:
    """The error for what is none: an adapter alone is named as one."""
    if path.is_dir():
        try:
            check_companions(path)
        except CheckpointError as error:
            return error
    return CheckpointError(path, f"not a checkpoint: {EXPECTED}")
