"""Where the time of a program goes: a trace of JAX's profiler, summed up by `jax.named_scope`."""

import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
TRACED_IN = re.compile(r'op_name="([^"]*)"')
CALLS = re.compile(r"calls=%?([\w.\-]+)")
CONTROL = ("while", "call", "conditional")  # their time is that of what they run


def seconds_by_scope(
    compiled: jax.stages.Compiled, run: Callable[[], object], scopes: tuple[str, ...]
) -> dict[str, float]:
    """Seconds of the device per scope in one run of a program, `"other"` for what is in none.

    Args:
      compiled: The program; instructions are looked up in its text.
      run: Runs it, and waits for its end.
      scopes: Names of scopes, none inside another.
    """
    text = compiled.as_text()
    module = text.split(maxsplit=2)[1].rstrip(",")
    scope_of = _scopes_of_instructions(text, scopes)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (trace,) = Path(folder).rglob("*.xplane.pb")
        seconds = Counter()
        for facts, duration in _events(str(trace)):
            name = facts.get("hlo_op")
            if facts.get("hlo_module") == module and not name.startswith(CONTROL):
                seconds[scope_of.get(name, "other")] += duration
    return dict(seconds)


def _events(trace: str) -> Iterator[tuple[dict, float]]:
    """Facts and seconds of what ran on the devices; on the host if there are none."""
    data = jax.profiler.ProfileData.from_file(trace)  # owns all that is read from it
    names = [plane.name for plane in data.planes]
    devices = [name for name in names if name.startswith("/device:")] or names
    for plane in data.planes:
        for line in plane.lines if plane.name in devices else ():
            for event in line.events:
                yield dict(event.stats), event.duration_ns / 1e9


def _scopes_of_instructions(text: str, scopes: tuple[str, ...]) -> dict[str, str]:
    """By name; a fusion that does not say where it was traced is in the scope of its inside."""
    found, of_computation, computation = {}, {}, ""
    for line in text.splitlines():
        if line and not line[0].isspace():  # computations come before those that call them
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        elif instruction := INSTRUCTION.match(line):
            path, calls = TRACED_IN.search(line), CALLS.search(line)
            inside = of_computation.get(calls[1] if calls else None, "other")
            parts = path[1].split("/") if path else ()
            scope = next((part for part in parts if part in scopes), inside)
            found[instruction[1]] = scope
            if scope != "other":
                of_computation.setdefault(computation, scope)
    return found
