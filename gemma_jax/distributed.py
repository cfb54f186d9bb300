"""One program over the devices of several processes, on one machine or many.

Every process runs the same commands on the same inputs; JAX's runtime makes one machine of their
devices. Only the first process speaks.
"""

import os
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

# Seconds: to wait for processes that have not come, and until one that is silent counts as dead.
# Then JAX ends the others, with a message that names it.
PATIENCE, SILENCE = 120, 20


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes together; must come before any array.

    Args:
      coordinator: `HOST:PORT` of the first process; `None` asks the cluster (Cloud TPU, GKE,
        Slurm), as for the others.

    Raises:
      ValueError: Arguments that do not fit together, or no cluster that knows the answers.
      RuntimeError: The processes did not meet in time.
    """
    given = {
        "coordinator": coordinator, "num_processes": num_processes, "process_id": process_id
    }  # fmt: skip
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{', '.join(missing)} missing: give all of {', '.join(given)}, or none")
    if coordinator is not None:
        host, colon, port = coordinator.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise ValueError(f"{coordinator=} must be HOST:PORT")
        if not 0 <= process_id < num_processes:  # pyright: ignore[reportOperatorIssue]
            raise ValueError(f"{process_id=} must be at least 0 and below {num_processes=}")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=SILENCE,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise RuntimeError(
            f"process {process_id} of {num_processes} did not meet the others at {coordinator}: "
            f"{reason}"
        ) from error
    _keep_stdout_for_results()


def fetched(array: jax.Array) -> np.ndarray:
    """The whole array, here; of what several processes hold, all of them must ask for it.

    Examples:
      >>> import jax.numpy as jnp
      >>> fetched(jnp.arange(3))
      array([0, 1, 2], dtype=int32)
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _keep_stdout_for_results() -> None:
    """What libraries print goes to stderr; of the processes only the first has results."""
    results = os.dup(1) if jax.process_index() == 0 else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w")
