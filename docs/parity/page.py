"""The page of figures: what `pytest --parity-report` wrote, as one table that can be searched.

    python docs/parity/page.py out/parity.json out/parity.html    # a page that stands alone

`docs/hooks.py` puts the same into the site (`index.md`). Nothing but the standard library.
"""

import json
import math
import sys
import tomllib
from collections import Counter
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
STORED = HERE / "rows.json"
HOW = "make parity"


def body(path: Path | None = None) -> str:
    """All that stands below the heading: of a file of rows, or of the one that is stored."""
    path = path or STORED
    if not path.exists():
        return f"<p><strong>No rows here.</strong> <code>{HOW}</code> makes them.</p>"
    known = json.loads(STORED.read_text("utf-8"))["rows"] if STORED.exists() else []
    files = tomllib.loads((ROOT / "tests" / "proven.toml").read_text("utf-8"))["files"]
    return page(json.loads(path.read_text("utf-8")), known, files, defects())


def defects() -> list[dict]:
    return tomllib.loads((HERE / "known.toml").read_text("utf-8"))["defect"]


def page(run: dict, known: list[dict], files, defects: list[dict]) -> str:
    """The parts of the page, for rows of a run; `known` are those of an earlier one."""
    rows = run["rows"]
    style, script = ((HERE / name).read_text("utf-8") for name in ("page.css", "page.js"))
    parts = [
        f"<style>\n{style}</style>",
        summary(run),
        failures(rows),
        missing(rows, known, files),
        '<h2 id="figures">Every figure</h2>',
        controls(rows),
        table(rows),
        '<h2 id="noise">Errors beside the noise of the oracle</h2>',
        strips(rows),
        '<h2 id="layers">Errors layer by layer</h2>',
        curves(rows),
        '<h2 id="known">Known defects elsewhere, and our result</h2>',
        defect_table(defects, rows),
        f"<script>\n{script}</script>",
    ]
    return '<div class="parity">\n' + "\n".join(parts) + "\n</div>\n"


def summary(run: dict) -> str:
    rows = run["rows"]
    outcomes = Counter(row["outcome"] for row in rows)
    figures = sum(len(row["figures"]) for row in rows)
    told = ", ".join(f"{outcomes[name]} {name}" for name in sorted(outcomes))
    versions = ", ".join(f"{name} {found}" for name, found in run["versions"].items())
    facts = {
        "Result": f"{figures} figures of {len(rows)} tests: {told or 'none'}",
        "Versions": versions,
        "Device": f"{run['device']} ({run['machine']})",
        "Date": run["date"],
        "Command": f"<code>{escape(run['command'])}</code>",
    }
    lines = (
        f"<dt>{name}</dt><dd>{value if name == 'Command' else escape(value)}</dd>"
        for name, value in facts.items()
    )
    return f'<dl class="facts">{"".join(lines)}</dl>'


def failures(rows: list[dict]) -> str:
    failed = [row["test"] for row in rows if row["outcome"] == "failed"]
    return listed("Failed", failed, "failed", open=True) if failed else ""


def missing(rows: list[dict], known: list[dict], files) -> str:
    """What this run says nothing of: files without a row, tests that were skipped or left out."""
    ran = {row["test"] for row in rows}
    seen = {test.partition("::")[0] for test in ran}
    silent = [f"tests/{name}" for name in files if f"tests/{name}" not in seen]
    absent = [row["test"] for row in known if row["test"] not in ran]
    skipped = [f"{r['test']}: {r['reason']}" for r in rows if r["outcome"] == "skipped"]
    return (
        listed("Files without a row", silent, "failed", open=True)
        + listed("In the stored run, but not in this one", absent, "skipped")
        + listed("Skipped", skipped, "skipped")
    )


def listed(title: str, names: list[str], kind: str, open: bool = False) -> str:
    if not names:
        return ""
    items = "".join(f"<li><code>{escape(name)}</code></li>" for name in names)
    summary = f'<summary class="{kind}">{title}: {len(names)}</summary>'
    return f"<details{' open' * open}>{summary}<ul>{items}</ul></details>"


def controls(rows: list[dict]) -> str:
    """A box for words, and menus of models and results."""

    def menu(name: str, all_of_them: str, values) -> str:
        options = "".join(f"<option>{escape(value)}</option>" for value in sorted(set(values)))
        return f'<select data-of="{name}"><option value="">{all_of_them}</option>{options}</select>'

    return (
        '<p class="controls"><input type="search" placeholder="gemma3n slices, logits, padding ..."'
        ' aria-label="Words that a row must have">'
        + menu("model", "every model", (row["model"] for row in rows))
        + menu("oracle", "every oracle", (row["oracle"] for row in rows))
        + menu("result", "every result", (row["outcome"] for row in rows))
        + '<output></output></p><p class="hint">A click on a heading sorts by it.</p>'
    )


HEADINGS = ("model", "feature, case", "output", "oracle", "noise floor", "tolerance", "seen error",
            "of tolerance", "result")  # fmt: skip


def table(rows: list[dict]) -> str:
    lines = [line for row in rows for line in lines_of(row)]
    heads = "".join(f"<th>{name}</th>" for name in HEADINGS)
    return (
        '<div class="wide" data-search-exclude><table class="figures">'
        f"<thead><tr>{heads}</tr></thead><tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )


def lines_of(row: dict):
    """One line for each output that a test compared; one for a test that compared no numbers."""
    what = (
        f"{escape(row['feature'])}<br><small>{escape(row['case'])}</small>"
        f"<details><summary>command</summary><code>{escape(command(row))}</code></details>"
    )
    for name, figure in row["figures"].items() or [("", None)]:
        used = share(figure) if figure else None
        result = result_of_line(row, used)
        cells = [
            cell(escape(row["model"])),
            cell(what),
            cell(escape(name or ("values" if figure else "as asserted"))),
            cell(escape(row["oracle"])),
            *numbers(figure),
            cell(bar(used), used),
            f'<td class="{result}">{result}</td>',
        ]
        words = escape(row["test"].replace("_", " ") + " " + row["test"], quote=True)
        yield (
            f'<tr data-words="{words}" data-model="{escape(row["model"], quote=True)}"'
            f' data-oracle="{escape(row["oracle"], quote=True)}" data-result="{result}">'
            f"{''.join(cells)}</tr>"
        )


def result_of_line(row: dict, used: float | None) -> str:
    """The test's own, but of an output that kept to its tolerance where another did not."""
    beyond = any(share(figure) > 1 for figure in row["figures"].values())
    return "passed" if beyond and used is not None and used <= 1 else row["outcome"]


def numbers(figure: dict | None):
    for name in ("noise", "tolerance", "error"):
        value = figure.get(name) if figure else None
        exact = figure and name == "tolerance" and value == 0
        yield cell("equal" if exact else short(value), value)


def cell(content: str, value: float | None = None) -> str:
    return f"<td>{content}</td>" if value is None else f'<td data-value="{value}">{content}</td>'


def short(value: float | None) -> str:
    """`4.6e-6`"""
    if value is None:
        return ""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    front, _, back = f"{value:.1e}".partition("e")
    return f"{front}e{int(back)}"


def share(figure: dict) -> float:
    """Of the tolerance, how much was used."""
    if not figure["tolerance"]:
        return math.inf if figure["error"] else 0.0
    return figure["error"] / figure["tolerance"]


def bar(used: float | None) -> str:
    if used is None:
        return ""
    kind = "over" if used > 1 else "used"
    percent = f"{100 * used:.0f}%" if math.isfinite(used) else "over"
    return f'<span class="{kind}"><i style="width:{100 * min(used, 1):.0f}%"></i></span> {percent}'


def command(row: dict) -> str:
    marks = " -m 'nightly or not nightly'" * row["nightly"]
    return f'python -m pytest{marks} "{row["test"]}"'


def strips(rows: list[dict]) -> str:
    """For each model a line of dots: errors in units of the noise; tolerances are 10 of them."""
    models: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        for name, figure in row["figures"].items():
            if figure.get("noise"):
                ratio = figure["error"] / figure["noise"]
                error, noise = short(figure["error"]), short(figure["noise"])
                told = f"{name}: {error}, noise {noise}; {row['case']}"
                models.setdefault(row["model"], []).append((ratio, told))
    if not models:
        return "<p>No row has a noise floor.</p>"
    left, width, step = 220, 640, 22
    height = step * len(models) + 34

    def x(ratio: float) -> float:
        clipped = min(max(math.log10(ratio) if ratio > 0 else -3.0, -3.0), 1.3)
        return left + (clipped + 3.0) / 4.3 * (width - left - 10)

    box = f'viewBox="0 0 {width} {height}"'
    parts = [f'<div data-search-exclude><svg class="strips" {box} role="img">']
    for ratio, name in ((0.001, "1/1000"), (0.1, "1/10"), (1, "noise"), (10, "tolerance")):
        at = x(ratio)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{height - 26}"/>')
        parts.append(f'<text x="{at:.1f}" y="{height - 10}" text-anchor="middle">{name}</text>')
    for i, (model, dots) in enumerate(models.items()):
        y = 16 + i * step
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(model)}</text>')
        parts += [
            f'<circle cx="{x(ratio):.1f}" cy="{y}" r="3.5"><title>{escape(told)}</title></circle>'
            for ratio, told in dots
        ]
    return "".join(parts) + "</svg></div>"


def curves(rows: list[dict]) -> str:
    charts = [
        curve(figure, row["model"], f"{name}; {row['case']}")
        for row in rows
        for name, figure in row["figures"].items()
        if len(figure.get("layers", ())) > 1
    ]
    return (
        f'<div class="charts" data-search-exclude>{"".join(charts)}</div>'
        if charts
        else "<p>None.</p>"
    )


def curve(figure: dict, title: str, case: str) -> str:
    """Largest error after each layer, logarithmic, below the noise floor and the tolerance."""
    layers, width, height, left, top, bottom = figure["layers"], 300, 170, 42, 10, 24
    lines = {"tolerance": figure["tolerance"], "noise": figure.get("noise")}
    positive = [v for v in (*layers, *lines.values()) if v and math.isfinite(v)]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)

    def y(value: float) -> float:
        power = min(max(math.log10(value) if value > 0 else low, low), high)
        return top + (high - power) / (high - low) * (height - top - bottom)

    def x(layer: int) -> float:
        return left + 8 + layer / max(len(layers) - 1, 1) * (width - left - 18)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<line class="grid" x1="{left}" x2="{width}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{left - 4}" y="{at + 4:.1f}" text-anchor="end">1e{power}</text>')
    for name, value in lines.items():
        if value:
            at = y(value)
            parts.append(
                f'<line class="{name}" x1="{left}" x2="{width}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text x="{width - 2}" y="{at - 3:.1f}" text-anchor="end">{name}</text>'
            )
    path = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(layers))
    parts.append(f'<polyline points="{path}"/>')
    for i, value in enumerate(layers):
        told = f"<title>layer {i}: {short(value)}</title>"
        parts.append(f'<circle cx="{x(i):.1f}" cy="{y(value):.1f}" r="3">{told}</circle>')
        if i in (0, len(layers) - 1):
            parts.append(f'<text x="{x(i):.1f}" y="{height - 8}" text-anchor="middle">{i}</text>')
    caption = f"<figcaption>{escape(title)}<br><small>{escape(case)}</small></figcaption>"
    return f"<figure>{''.join(parts)}</svg>{caption}</figure>"


def defect_table(defects: list[dict], rows: list[dict]) -> str:
    lines = []
    for defect in defects:
        links = ", ".join(
            f'<a href="{escape(link, quote=True)}">{escape(link_name(link))}</a>'
            for link in defect.get("links", ())
        )
        seen_in = f"<br><small>{escape(defect['seen'])}</small>" if "seen" in defect else ""
        results = "".join(result_of_test(test, rows) for test in defect["tests"])
        lines.append(
            f"<tr><td>{escape(defect['project'])}</td><td>{escape(defect['what'])}{seen_in}"
            f"{'<br>' * bool(links)}{links}</td><td>{escape(defect['ours'])}</td>"
            f"<td>{results}</td></tr>"
        )
    names = ("project", "defect", "here", "our tests, and their result")
    heads = "".join(f"<th>{name}</th>" for name in names)
    return (
        f'<div class="wide"><table class="known"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def link_name(link: str) -> str:
    """`owner/name#12` of an address of GitHub."""
    words = link.removeprefix("https://github.com/").split("/")
    return f"{words[0]}/{words[1]}#{words[3]}" if len(words) == 4 else link


def result_of_test(test: str, rows: list[dict]) -> str:
    """Of all cases of one test."""
    found = [row for row in rows if row["test"] == test or row["test"].startswith(f"{test}[")]
    outcomes = Counter(row["outcome"] for row in found)
    kind = "failed" if outcomes["failed"] else "passed" if outcomes["passed"] else "skipped"
    told = ", ".join(f"{n} {name}" for name, n in sorted(outcomes.items())) or "not in this run"
    return f'<div><code>{escape(test)}</code> <b class="{kind}">{told}</b></div>'


ALONE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>gemma-jax: parity</title>
<body style="margin:2rem;font-family:system-ui,sans-serif">
<h1>Parity</h1>
{}</body></html>
"""


def main(rows: str, target: str) -> None:
    if not Path(rows).exists():
        sys.exit(f"{rows} does not exist: `{HOW}` makes rows and page")
    Path(target).write_text(ALONE.format(body(Path(rows))), "utf-8")
    print(f"{target}: open it in a browser")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("python docs/parity/page.py ROWS.json PAGE.html")
    main(*sys.argv[1:])
