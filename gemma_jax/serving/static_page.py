"""GET /: a page to talk to the model, and its files.

They are read once and need no key: there is nothing in them that anybody could not read in the
sources. What the page asks for needs one, as for everybody.
"""

from importlib import resources

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Nothing but the files of this server: what a model writes may be anything, and stays text.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _read() -> dict[str, tuple[bytes, str]]:
    folder = resources.files("gemma_jax.serving") / "page"
    pages: dict[str, tuple[bytes, str]] = {}
    for file in folder.iterdir():
        kind = _KINDS.get(file.name.rpartition(".")[2])
        if kind is not None:
            path = "/" if file.name == "index.html" else f"/page/{file.name}"
            pages[path] = (file.read_bytes(), kind)
    return pages


PAGES = _read()  # path -> content and its type


async def page(http: HttpRequest) -> Response:
    """GET / and /page/..."""
    content, kind = PAGES[http.url.path]
    return Response(content, headers={**HEADERS, "Content-Type": kind})
