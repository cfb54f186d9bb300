"""How fast a model runs here: prefill, decoding, and the way from a command to its first token.

Steady-state figures leave compilation out (one run of each kind goes before) and wait for the
device before the clock is read. Starts are measured from outside, on child processes, because only
a new process pays for imports, loading and compilation.

Tokens are random: the work does not depend on them.
"""

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.session import Session

DECODE_PROMPT = 16  # tokens in front of the token loop that is timed
START_PROMPT, START_TOKENS = "The capital of France is", 16

Rows = Sequence[Sequence[int]]
Summary = dict[str, Any]  # median, and runs: all values in the order they were measured
Tell = Callable[[str], None]  # is given a line as soon as something was measured


def silent(line: str) -> None:
    """The `Tell` that says nothing."""


def check_lengths(context: int, prompt_tokens: int, new_tokens: int) -> None:
    """Raises `ValueError` if `steady_state` would not fit the context of a model."""
    short = min(DECODE_PROMPT, prompt_tokens)
    needed = {
        f"{prompt_tokens=} and a token after it": prompt_tokens + 1,
        f"{new_tokens=} after a prompt of {short}": short + new_tokens + 1,
    }
    for what, length in needed.items():
        if length > context:
            raise ValueError(f"{what} take {length:,} places; the model's context has {context:,}")


def steady_state(
    model: Gemma,
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    repeats: int,
    tell: Tell = silent,
) -> dict[str, Summary]:
    """Tokens per second, over all rows of a batch, of reading a prompt and of the token loop."""
    check_lengths(model.cfg.max_positions, prompt_tokens, new_tokens)
    prompt = random_rows(model, batch, prompt_tokens)
    short = random_rows(model, batch, min(DECODE_PROMPT, prompt_tokens))
    speeds = {"prefill_tokens_per_s": [], "decode_tokens_per_s": []}
    for turn in range(-1, repeats):  # the first turn compiles
        read_s, _ = prefill(model, prompt)
        write_s, _ = decode(model, short, new_tokens)
        read, write = batch * prompt_tokens / read_s, batch * new_tokens / write_s
        if turn < 0:
            tell("compiled prefill and decoding")
            continue
        speeds["prefill_tokens_per_s"].append(read)
        speeds["decode_tokens_per_s"].append(write)
        which = _count(turn, repeats)
        tell(f"{which}: prefill {read:,.1f} tokens/s, decoding {write:,.1f} tokens/s")
    return {name: summary(runs) for name, runs in speeds.items()}


def prefill(model: Gemma, rows: Rows) -> tuple[float, list[list[int]]]:
    """Seconds from prompts to the choice of the first new tokens, and these tokens."""
    session = Session(model, len(rows), max(map(len, rows)) + 1)
    seconds = _clock(session, lambda: session.prefill(rows, max_new_tokens=1))
    return seconds, session.decode(1)


def decode(
    model: Gemma, rows: Rows, new_tokens: int, *, room: int = 0
) -> tuple[float, list[list[int]]]:
    """Seconds of a token loop of `new_tokens` steps, and all tokens chosen.

    Reading the prompt chooses one token, before the clock starts; each step adds one. `room` makes
    space for more steps, so that a short run compiles what a long one needs.
    """
    room = max(room, new_tokens) + 1
    session = Session(model, len(rows), max(map(len, rows)) + room)
    session.prefill(rows, max_new_tokens=room)
    seconds = _clock(session, lambda: session.decode(new_tokens + 1))
    return seconds, session.chosen


def _clock(session: Session, work: Callable[[], object]) -> float:
    jax.block_until_ready(vars(session))
    start = time.perf_counter()
    work()
    jax.block_until_ready(vars(session))
    return time.perf_counter() - start


def random_rows(model: Gemma, batch: int, length: int) -> list[list[int]]:
    """Token ids, the same at every call."""
    return np.random.default_rng(0).integers(0, model.cfg.vocab_size, (batch, length)).tolist()


def starts(
    options: Sequence[str], repeats: int, *, tell: Tell = silent
) -> dict[str, dict[str, Summary]]:
    """From the start of `gemma-jax generate` to the first byte of text, and the peak memory.

    `cold_start` has an empty compilation cache, `warm_start` one that holds the programs. Files are
    read through the system's page cache in both.

    Args:
      options: Of `generate`: `--model` and what else matters.
    """
    cold, warm = [], []
    for turn in range(repeats):
        with tempfile.TemporaryDirectory(prefix="gemma-jax-bench-") as cache:
            for runs, state in ((cold, "empty"), (warm, "filled")):
                runs.append(_start(options, cache))
                which = _count(turn, repeats)
                tell(f"{which}: first token, compile cache {state}: {runs[-1][0]:.2f} s")
    return {
        name: {"first_token_s": summary(seconds), "peak_rss_bytes": summary(sizes)}
        for name, (seconds, sizes) in {"cold_start": zip(*cold), "warm_start": zip(*warm)}.items()
    }


def _start(options: Sequence[str], cache: str) -> tuple[float, int]:
    """`(seconds to the first byte on stdout, largest resident size)` of one process."""
    command = [sys.executable, "-m", "gemma_jax.cli", "generate", START_PROMPT, *options]
    command += ["--max-new-tokens", str(START_TOKENS)]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        child = subprocess.Popen(
            command, bufsize=0, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL,
            env=env,
        )  # fmt: skip
        first = child.stdout.read(1)
        seconds = time.perf_counter() - start
        while child.stdout.read(1 << 16):
            pass
        child.stdout.close()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode or not first:
            errors.seek(0)
            last = errors.read().strip().rpartition("\n")[2].removeprefix("error: ")
            kind = ValueError if child.returncode == 2 else RuntimeError  # what the user can mend
            raise kind(f"gemma-jax generate failed with code {child.returncode}: {last}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _count(turn: int, repeats: int) -> str:
    return f"run {turn + 1} of {repeats}"


def import_seconds(repeats: int, *, tell: Tell = silent) -> Summary:
    """What `import gemma_jax` adds to `import jax`."""
    code = (
        "import time, jax; start = time.perf_counter(); import gemma_jax; "
        "print(time.perf_counter() - start)"
    )
    command = [sys.executable, "-c", code]
    runs = []
    for turn in range(repeats):
        runs.append(float(subprocess.run(command, capture_output=True, check=True).stdout))
        tell(f"{_count(turn, repeats)}: import {runs[-1]:.3f} s")
    return summary(runs)


def summary(runs: Sequence[float]) -> Summary:
    return {"median": statistics.median(runs), "runs": list(runs)}


def peak_device_bytes() -> int | None:
    """Largest use of the first device's memory so far; `None` where it does not tell (CPU)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def machine_facts() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    device = jax.local_devices()[0]
    return {
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "gemma_jax": importlib.metadata.version("gemma-jax"),
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.local_device_count(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
