"""New folders that appear whole or not at all."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CheckpointError

ADVICE = {
    errno.ENOSPC: "no space left: free some, or choose another disk",
    errno.EDQUOT: "the disk quota is used up: free some, or choose another disk",
    errno.EACCES: "no permission to write there: choose another folder",
    errno.EPERM: "no permission to write there: choose another folder",
    errno.EROFS: "the disk is read-only: choose another one",
}


@contextmanager
def new_folder(target: Path, needed: int = 0) -> Iterator[Path]:
    """A temporary sibling to write into, renamed to `target` at the end.

    Whatever goes wrong, an interruption included, the sibling is removed.

    Args:
      target: Must not exist, or be an empty folder.
      needed: Bytes that will be written; refused at once if the disk has less.

    Raises:
      CheckpointError: the target is taken, or the file system says no.
    """
    target = Path(os.path.abspath(target))
    part = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        _refuse_taken(target)
        if (free := shutil.disk_usage(target.parent).free) < needed:
            raise CheckpointError(target, f"needs {needed:,} bytes, the disk has {free:,} left")
        part.mkdir()
        yield part
        part.replace(target)  # an empty folder gives way
    except OSError as error:
        reason = ADVICE.get(error.errno) or error.strerror or str(error)
        raise CheckpointError(target, f"cannot be written: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _refuse_taken(target: Path) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(target, "its parent folder does not exist: create it first")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(target, "a file is in the way: choose another name")
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(target, "the folder is not empty: choose another, or empty it first")
