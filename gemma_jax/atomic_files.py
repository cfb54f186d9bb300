"""Writing files so that a failure leaves nothing half-written behind."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `target`, which takes its place if the block succeeds."""
    target = Path(target)
    if not target.parent.is_dir():
        raise FileNotFoundError(2, "No such folder", str(target.parent))
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    mask = os.umask(0)  # mkstemp makes files for the owner alone; the result is an ordinary one
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
