"""New folders that appear whole or not at all."""

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

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

    Whatever goes wrong, an interruption included, the sibling is removed. Several processes get the
    same sibling: they must share the file system, and come here together.

    Args:
      target: Must not exist, or be an empty folder.
      needed: Bytes that will be written; refused at once if the disk has less.

    Raises:
      CheckpointError: the target is taken, or the file system says no.
    """
    target = Path(os.path.abspath(target))
    part = target.parent / f".{target.name}.{_common_random():08x}.part"
    first = jax.process_index() == 0
    try:
        _refuse_taken(target)
        if (free := shutil.disk_usage(target.parent).free) < needed:
            raise CheckpointError(target, f"needs {needed:,} bytes, the disk has {free:,} left")
        if first:
            part.mkdir()
        _meet("begin", part)
        yield part
        _meet("written", part)
        if first:
            part.replace(target)  # an empty folder gives way
        _meet("end", part)
    except OSError as error:
        reason = ADVICE.get(error.errno) or error.strerror or str(error)
        raise CheckpointError(target, f"cannot be written: {reason}") from error
    finally:
        if first:
            shutil.rmtree(part, ignore_errors=True)


def _common_random() -> int:
    """The same in all processes."""
    number = np.uint32(uuid.uuid4().int % 2**32)
    return int(number if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(number))


def _meet(where: str, part: Path) -> None:
    """All processes wait for each other."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{part.name}: {where}")


def _refuse_taken(target: Path) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(target, "its parent folder does not exist: create it first")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(target, "a file is in the way: choose another name")
    if target.is_dir() and any(target.iterdir()):
        raise CheckpointError(target, "the folder is not empty: choose another, or empty it first")
