"""How long tests take: seconds by file are stored, and one that takes longer than asked for fails.

Seconds are the lesser of the clock's and the processors': neighbours stretch the one, idle cores
the other. `durations.json` holds those of each test file, set-up included, and its machine. Where a
file runs, its figure is replaced by (with the rest of README's test command)

    pytest --store-durations

The files that take longest run first, so that no worker ends with a long one alone.
"""

import json
import os
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STORED = ROOT / "tests" / "durations.json"
AIM = 15.0  # seconds that a test by day may take
LIMIT = 2 * AIM  # what CI is to give: a machine's mood alone fails no test
YARDSTICK = 0.087  # seconds of `yardstick` on the machine of `durations.json`
_SPENT = pytest.StashKey[tuple[float, float]]()
_seconds = Counter()


def pytest_addoption(parser):
    group = parser.getgroup("durations")
    group.addoption("--store-durations", action="store_true", help=f"write {STORED.name}")
    group.addoption(
        "--limit-seconds",
        type=float,
        default=0.0,
        help=f"a test not marked `nightly` that takes longer fails (CI is to give {LIMIT:g}); one"
        f" that takes longer than {AIM:g} is named at the end",
    )


def pytest_collection_modifyitems(items):
    seconds = json.loads(STORED.read_text("utf-8"))["seconds"] if STORED.exists() else {}
    items.sort(key=lambda item: -seconds.get(_file(item.nodeid), 0.0))


def yardstick() -> float:
    """Processor seconds of a fixed piece of work: more on a slower machine, or a loaded one."""
    start = time.process_time()
    sum(i * i % 7 for i in range(1_500_000))
    return time.process_time() - start


def spent() -> tuple[float, float]:
    """Seconds of the clock, and of processors: this process and the children it waited for."""
    return time.perf_counter(), sum(os.times()[:4])


def lesser(before, after) -> float:
    """Seconds between two readings, by the clock that moved less."""
    return min(end - start for start, end in zip(before, after))


def too_long(used: float, limit: float) -> float | None:
    """How many times `limit` the `used` seconds are, if more than once.

    A machine that does the yardstick slower than the one of `durations.json` gets as much more.
    """
    if used <= limit:
        return None
    share = used / (limit * max(1.0, yardstick() / YARDSTICK))
    return share if share > 1 else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    item.stash[_SPENT] = spent()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Set-up counts, that of a module's fixtures for the test that meets it first."""
    report, limit = (yield), item.config.getoption("limit_seconds")
    report.used = lesser(item.stash[_SPENT], spent())  # since the test began
    if limit and report.when == "call" and report.passed and not item.get_closest_marker("nightly"):
        if share := too_long(report.used, limit):
            report.outcome = "failed"
            report.longrepr = (
                f"took {share:.1f} times the {limit:g} seconds it gets: make it smaller,"
                " or mark it `nightly` (tests/README.md)"
            )
    return report


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("limit_seconds"):
        return
    passed = terminalreporter.stats.get("passed", [])
    slow = [report for report in passed if report.used > AIM and "nightly" not in report.keywords]
    for report in sorted(slow, key=lambda report: -report.used):
        terminalreporter.write_line(f"SLOW {report.used:.0f} s, aim {AIM:g}: {report.nodeid}")


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/")


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        _seconds[_file(report.nodeid)] += report.used


def pytest_sessionfinish(session):
    if not session.config.getoption("store_durations") or hasattr(session.config, "workerinput"):
        return
    stored = json.loads(STORED.read_text("utf-8")) if STORED.exists() else {"seconds": {}}
    there = {name: s for name, s in stored["seconds"].items() if (STORED.parent / name).exists()}
    seconds = there | {name: round(s, 1) for name, s in _seconds.items()}
    order = sorted(seconds, key=lambda name: (-seconds[name], name))
    new = {
        "command": "README's tests with --store-durations",
        "machine": f"{os.cpu_count()} cores, yardstick {yardstick():.3f} s",
        "total": round(sum(seconds.values()), 1),
        "seconds": {name: seconds[name] for name in order},
    }
    STORED.write_text(json.dumps(new, indent=1) + "\n", "utf-8")
