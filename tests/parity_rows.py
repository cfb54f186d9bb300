"""What tests prove, in figures: `pytest --parity-report FILE` writes a row for each test.

`proven.toml` names the tests, and what each compares with what. Their helpers (`seen`) and numpy's
(`np.testing.assert_allclose`, `assert_array_equal`) note how far off a result was beside how far
off it may be; of several comparisons of one output the worst stays. Rows come from the workers of
pytest-xdist too. `docs/parity/page.py` makes a page of them.

    pytest -n 2 --parity-only --parity-report out/parity.json    # those tests alone: `make parity`
"""

import json
import math
import os
import platform
import re
import shlex
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent
TABLE = tomllib.loads((TESTS / "proven.toml").read_text("utf-8"))
FILES: dict[str, dict] = TABLE["files"]
MODELS: dict[str, str] = TABLE["models"]
LAYERED = ("layer_outputs", "vision_layer_outputs", "conformer_outputs")  # layers are axis 0
PARTS = {"grad.": "gradients", "param.": "parameters", "merged.": "merged weights"}
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "gemma-jax")

_open: list[dict] = []  # the row of the test that runs
_rows: dict[str, dict] = {}  # of all tests, by node id
_numpy: dict = {}  # its own functions, while ours stand in their places


class Tolerance(float):
    """An allowed error that knows of which output, of which folder, and how large the oracle's own
    rounding is."""

    def __new__(cls, value: float, of: str, folder: str = "", noise: float = 0.0):
        self = super().__new__(cls, value)
        self.of, self.folder, self.noise = of, folder, noise
        return self

    def __mul__(self, factor: float) -> "Tolerance":
        return Tolerance(float(self) * factor, self.of, self.folder, self.noise)

    __rmul__ = __mul__


def seen(error, tolerance: float, of: str = "") -> None:
    """Notes the largest number of `error` beside its tolerance, for the test that runs.

    A tolerance may say what it is of (`Tolerance`).
    """
    if not _open:
        return
    error = np.abs(np.asarray(error, np.float64))
    name = of or getattr(tolerance, "of", "")
    figure = {"error": largest(error), "tolerance": digits(tolerance)}
    if noise := getattr(tolerance, "noise", None):
        figure["noise"] = digits(noise)
    if name in LAYERED and error.ndim > 1:
        figure["layers"] = [largest(one) for one in error]
    row = _open[-1]
    row["model"] = MODELS.get(getattr(tolerance, "folder", None), row["model"])
    known = row["figures"].get(label(name))
    if known is None or share(figure) > share(known):
        row["figures"][label(name)] = figure


def label(name: str) -> str:
    """What stands for an output on the page: all gradients of a model are one line."""
    name, comma, measure = name.partition(", ")
    for part, words in PARTS.items():
        if part in name:
            return words + comma + measure
    return comma.join((re.sub(r"^.*\.(?=[a-z])", "", name), measure))


def share(figure: dict) -> float:
    """Of the tolerance, how much was used."""
    if not figure["tolerance"]:
        return math.inf if figure["error"] else 0.0
    return figure["error"] / figure["tolerance"]


def digits(value: float) -> float:
    return float(f"{float(value):.4g}")


def largest(error: np.ndarray) -> float:
    most = float(error.max(initial=0.0))
    return digits(most) if math.isfinite(most) else math.inf


def noted_allclose(actual, desired, rtol=1e-7, atol=0.0, *args, **options) -> None:
    note(actual, desired, rtol, atol, options.get("err_msg", ""))
    _numpy["assert_allclose"](actual, desired, rtol, atol, *args, **options)


def noted_array_equal(actual, desired, *args, **options) -> None:
    note(actual, desired, 0.0, 0.0, options.get("err_msg", ""))
    _numpy["assert_array_equal"](actual, desired, *args, **options)


def note(actual, desired, rtol, atol, name) -> None:
    """The place where the most of what is allowed there is used; what is no number has none."""
    if not _open:
        return
    try:
        ours, theirs = (np.asarray(value, np.float64) for value in (actual, desired))
        ours, theirs = np.broadcast_arrays(ours, theirs)
    except (TypeError, ValueError):
        return
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    if not same.size:
        return
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.where(same, 0.0, np.abs(ours - theirs))
        allowed = atol + rtol * np.abs(np.where(same & ~np.isfinite(theirs), 0.0, theirs))
        used = np.where(same, 0.0, np.nan_to_num(error / allowed, nan=np.inf, posinf=np.inf))
    at = np.unravel_index(used.argmax(), used.shape)
    seen(np.nan_to_num(error[at], nan=np.inf, posinf=np.inf), float(allowed[at]), str(name))


def row_of(item) -> dict | None:
    """The row of a test that `proven.toml` names, so far without figures."""
    facts = facts_of(item)
    if facts is None:
        return None
    params = getattr(item, "callspec", None)
    words = " ".join(map(str, params.params.values())).split() if params else []
    family = next((MODELS[word] for word in words if word in MODELS), None)
    case = item.originalname.removeprefix("test_").replace("_", " ")
    return {
        "test": item.nodeid,
        "model": family or facts["model"],
        "feature": facts["feature"],
        "case": f"{case} [{params.id}]" if params else case,
        "oracle": facts["oracle"],
        "nightly": item.get_closest_marker("nightly") is not None,
        "device": device(),
        "figures": {},
    }


def facts_of(item) -> dict | None:
    try:
        facts = FILES.get(item.path.relative_to(TESTS).as_posix())
    except ValueError:
        return None
    named = getattr(item, "originalname", None)
    if facts is None or named is None or named not in facts.get("tests", [named]):
        return None
    return facts


def device() -> str:
    """Of this process, if it has asked JAX for any."""
    if "jax" not in sys.modules:
        return ""
    found = sys.modules["jax"].devices()
    return f"{len(found)} x {found[0].device_kind}"


def pytest_addoption(parser):
    group = parser.getgroup("parity")
    group.addoption("--parity-report", metavar="FILE", help="write what was compared, and how near")
    group.addoption(
        "--parity-only", action="store_true", help="only the tests that tests/proven.toml names"
    )


def pytest_configure(config):
    if config.getoption("parity_report") and not _numpy:
        for name, ours in (
            ("assert_allclose", noted_allclose),
            ("assert_array_equal", noted_array_equal),
        ):
            _numpy[name] = getattr(np.testing, name)
            setattr(np.testing, name, ours)


def pytest_unconfigure():
    while _numpy:
        setattr(np.testing, *_numpy.popitem())


def pytest_ignore_collect(collection_path, config):
    if not config.getoption("parity_only") or collection_path.suffix != ".py":
        return None
    inside = collection_path.is_relative_to(TESTS)
    name = collection_path.relative_to(TESTS).as_posix() if inside else ""
    return None if name in FILES or collection_path.name == "conftest.py" else True


def pytest_collection_modifyitems(config, items):
    if config.getoption("parity_only"):
        others = [item for item in items if facts_of(item) is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if facts_of(item) is not None]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    row = row_of(item) if item.config.getoption("parity_report") else None
    if row is None:
        return (yield)
    item.user_properties.append(("parity", row))  # what xdist carries to the process that writes
    _open.append(row)
    try:
        return (yield)
    finally:
        _open.pop()


def pytest_runtest_logreport(report):
    row = dict(report.user_properties).get("parity")
    if row is None:
        return
    known = _rows.get(report.nodeid, {"outcome": "passed", "reason": ""})
    outcome = known["outcome"] if report.passed else report.outcome
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else known["reason"]
    _rows[report.nodeid] = row | {"outcome": outcome, "reason": reason.removeprefix("Skipped: ")}


def pytest_sessionfinish(session):
    target = session.config.getoption("parity_report")
    if not target or hasattr(session.config, "workerinput"):
        return
    rows = sorted(_rows.values(), key=lambda row: row["test"])
    devices = sorted({row.pop("device") for row in rows})
    told = run_facts(session.config) | {"device": ", ".join(devices)}
    head = json.dumps(told, indent=1)[:-2]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n{lines}\n ]\n}}\n', "utf-8")


def run_facts(config) -> dict:
    options = os.environ.get("PYTEST_ADDOPTS")
    words = shlex.join(config.invocation_params.args)
    return {
        "command": f"PYTEST_ADDOPTS={shlex.quote(options)} " * bool(options)
        + f"python -m pytest {words}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {name: found for name in PACKAGES if (found := installed(name))},
    }


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
