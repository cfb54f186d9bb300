"""Brings documents that lie elsewhere in the repository into the site, and mends their links; puts
the figures of the tests into their page.

Every document is written for its own place, where its links work. Here a link to another document
becomes a link to its page, and one to a file that is no page becomes the file's name.
"""

import os
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "kernels/README.md": "rooms/kernels.md",
    "kernels/bench/README.md": "rooms/bench.md",
    "checkpoints/README.md": "rooms/checkpoints.md",
    "checkpoints/digits/README.md": "rooms/digits.md",
    "checkpoints/elastic/README.md": "rooms/elastic.md",
    "checkpoints/spoken/README.md": "rooms/spoken.md",
    "gemma_jax/benchmarks/README.md": "rooms/benchmarks.md",
    "gemma_jax/matformer/README.md": "rooms/matformer.md",
    "gemma_jax/vision/README.md": "rooms/vision.md",
}
HOMES = {page: home for home, page in PAGES.items()}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config) -> Files:
    for home, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / home)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    here = page.file.src_uri
    home = HOMES.get(here, f"docs/{here}")

    def mend(match: re.Match) -> str:
        mark, text, link = match.groups()
        if re.match(r"[a-z]+:|#", link):
            return match.group()
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(home), path))
        uri = PAGES.get(target) or PAGES.get(f"{target}/README.md") or target.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            return text  # the file is in the repository, but no page of the site
        relative = os.path.relpath(uri, posixpath.dirname(here) or ".")
        return f"{mark}[{text}]({relative}{'#' if anchor else ''}{anchor})"

    return LINK.sub(mend, markdown)


def on_page_content(html: str, page, config, files: Files) -> str:
    """Into the page of figures, those of the file that `PARITY` names, or the stored ones."""
    if page.file.src_uri != "parity/index.md":
        return html
    sys.path.insert(0, str(ROOT / "docs" / "parity"))
    import page as figures

    rows = os.environ.get("PARITY")
    if rows and not Path(rows).exists():
        raise FileNotFoundError(f"PARITY={rows} does not exist: `make parity` makes it")
    place = re.compile(r'<div id="parity-rows">.*?</div>', re.DOTALL)
    return place.sub(lambda _: figures.body(Path(rows) if rows else None), html)
