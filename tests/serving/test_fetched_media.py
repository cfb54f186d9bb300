"""Pictures of domains that whoever started the server allows."""

import base64
import contextlib
import http.server
import socket
import threading

import pytest
from test_openai_client import picture

from gemma_jax.serving import media
from gemma_jax.serving.errors import ApiError
from gemma_jax.serving.limits import Limits
from gemma_jax.serving.media import MediaReader

HOST, PUBLIC = "pictures.example", "93.184.216.34"
PNG = base64.b64decode(picture(7).partition(",")[2])


class Handler(http.server.BaseHTTPRequestHandler):
    """Has a picture, a way elsewhere, and too much."""

    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        self.send_response(302 if self.path == "/away" else 200)
        if self.path == "/away":
            self.send_header("Location", "https://evil.example/a.png")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write({"/away": b"", "/much": bytes(1 << 22)}.get(self.path, PNG))

    def log_message(self, *arguments): ...


class Plain:
    """In the place of TLS, which needs certificates."""

    @contextlib.contextmanager
    def wrap_socket(self, plain, server_hostname):
        assert server_hostname == HOST
        yield plain


@pytest.fixture
def site(monkeypatch):
    """A server on the loopback that stands for a public address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.addresses = [], [PUBLIC]
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def connected(address, timeout):
        assert address == (PUBLIC, 443)  # the one that was looked at
        wire = socket.socket()
        wire.settimeout(timeout)
        wire.connect(server.server_address)
        return wire

    def looked_up(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in server.addresses]

    monkeypatch.setattr(media.socket, "getaddrinfo", looked_up)
    monkeypatch.setattr(media.socket, "create_connection", connected)
    monkeypatch.setattr(media.ssl, "create_default_context", Plain)
    yield server
    server.shutdown()
    server.server_close()


def fetched(url: str, domains=(HOST,)):
    limits = Limits(body_bytes=1 << 20, media_seconds=5)
    return MediaReader(limits, frozenset(domains)).image(url, "image_url")


def test_an_allowed_picture(site):
    assert fetched(f"https://{HOST}/a.png?size=1").to_pil().size == (30, 30)
    assert site.asked == [(HOST, "/a.png?size=1")]


@pytest.mark.parametrize("path", ["/away", "/much"])
def test_no_redirects_and_no_floods(site, path):
    with pytest.raises(ApiError, match=f"{HOST} could not be read"):
        fetched(f"https://{HOST}{path}")
    assert len(site.asked) == 1


@pytest.mark.parametrize("addresses", [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::1"], []])
def test_no_private_addresses(site, addresses):
    site.addresses = addresses
    with pytest.raises(ApiError, match="could not be read"):
        fetched(f"https://{HOST}/a.png")
    assert not site.asked


@pytest.mark.parametrize(
    "url",
    [
        f"http://{HOST}/a.png",
        f"https://{HOST}:8443/a.png",
        f"https://{HOST}@evil.example/a.png",
        f"https://ann:word@{HOST}/a.png",
        f"https://evil.example/{HOST}",
        f"https://not.{HOST}/a.png",
        "file:///etc/passwd",
    ],
)
def test_nothing_else_is_fetched(site, url):
    with pytest.raises(ApiError, match="others are not fetched") as caught:
        fetched(url)
    assert caught.value.code == "unsupported_url" and not site.asked
