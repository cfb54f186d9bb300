"""Pictures and sounds that requests bring along.

They come as `data:` URLs, in full. Nothing is read from this machine's files, and nothing fetched,
unless domains were allowed by whoever started the server: then by HTTPS alone, without redirects,
from public addresses, which are the ones connected to (a name could mean another one a moment
later).
"""

import base64
import binascii
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes, urlsplit

from gemma_jax.audio.waves import Audio
from gemma_jax.serving.errors import ApiError, refused
from gemma_jax.serving.limits import Limits
from gemma_jax.vision.images import FORMATS, Image, pillow

_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[\w.+-]+)*)(;base64)?,", re.ASCII)


@dataclass
class MediaReader:
    """Reads the media of one request, and counts them.

    Attributes:
      domains: Hosts that pictures may be fetched from; usually none.
    """

    limits: Limits
    domains: frozenset[str] = frozenset()
    count: int = field(default=0, init=False)

    def image(self, url: str, param: str) -> Image:
        """The picture of a URL.

        Raises:
          ApiError: No `data:` URL of a picture, or one of too many pixels.
        """
        data = self._content(url, "image", param)
        self._check_pixels(data, param)
        return _read(lambda: Image(data), "the image given as bytes", param)

    def audio(self, encoded: str, param: str) -> Audio:
        """The clip of base64 text, or of a `data:` URL."""
        url = encoded if encoded.startswith("data:") else f"data:audio/any;base64,{encoded}"
        return self.clip(self._content(url, "audio", param), param)

    def clip(self, data: bytes, param: str) -> Audio:
        """The clip of a file's bytes.

        Raises:
          ApiError: No sound, or one that is too long.
        """
        most = self.limits.audio_seconds
        if (seconds := _declared_seconds(data)) > most:
            raise refused(f"{param}: a clip of {seconds:.0f} s is longer than {most:g} s", param)
        clip = _read(lambda: Audio(data), "the sound given as bytes", param)
        if clip.seconds > most:
            raise refused(
                f"{param}: a clip of {clip.seconds:.0f} s is longer than {most:g} s", param
            )
        return clip

    def _content(self, url: str, kind: str, param: str) -> bytes:
        self.count += 1
        if self.count > self.limits.media_items:
            raise refused(f"{param}: more than {self.limits.media_items} pictures and clips", param)
        if url[:5].lower() == "data:":
            return _from_data(url, kind, param)
        parts = _split(url)
        if parts is not None and parts.scheme == "https" and parts.hostname in self.domains:
            return fetch(parts.hostname, _target(parts), self.limits, param)
        known = f", or https: URLs of {', '.join(sorted(self.domains))}" if self.domains else ""
        raise refused(
            f"{param}: expected a data: URL with the {kind} in it{known}; others are not fetched",
            param,
            "unsupported_url",
        )

    def _check_pixels(self, data: bytes, param: str) -> None:
        try:
            with pillow().open(io.BytesIO(data), formats=FORMATS) as picture:
                width, height = picture.size
        except ImportError:
            raise
        except Exception:  # whatever it is, reading it says so in words
            return
        if width * height > self.limits.pixels:
            raise refused(
                f"{param}: {width} x {height} pixels are more than {self.limits.pixels:,}", param
            )


def _read(make, name: str, param: str):
    try:
        return make()
    except (ValueError, ImportError) as error:
        raise refused(f"{param}: {str(error).replace(name, 'this', 1)}", param) from None


def _declared_seconds(data: bytes) -> float:
    """What the header of a sound says; 0 if it cannot be read, which reading tells in words."""
    try:
        import soundfile

        info = soundfile.info(io.BytesIO(data))
        return info.frames / info.samplerate
    except Exception:
        return 0.0


def _from_data(url: str, kind: str, param: str) -> bytes:
    head = _DATA.match(url[:256])
    if head is None:
        raise refused(f"{param}: expected data:{kind}/...;base64,...", param)
    if head[1] and not head[1].lower().startswith(kind + "/"):
        raise refused(f"{param}: expected a data: URL of type {kind}/..., got {head[1]}", param)
    content = url[head.end() :]
    try:
        if head[3]:
            return base64.b64decode("".join(content.split()), validate=True)
        return unquote_to_bytes(content)
    except (binascii.Error, ValueError):
        raise refused(f"{param}: what the data: URL holds is no base64", param) from None


def _split(url: str):
    try:
        parts = urlsplit(url)
        return parts if parts.port in (None, 443) and "@" not in parts.netloc else None
    except ValueError:
        return None


def _target(parts) -> str:
    path = parts.path or "/"
    path = f"{path}?{parts.query}" if parts.query else path
    return "".join(c if "!" <= c <= "~" else "_" for c in path)


def fetch(host: str, target: str, limits: Limits, param: str) -> bytes:
    """What an allowed host says, from a public address.

    Raises:
      ApiError: It says something else, too much, or nothing in time.
    """
    try:
        return _fetch(host, target, limits)
    except ApiError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = type(error).__name__
        raise refused(f"{param}: {host} could not be read ({reason})", param) from None


def _fetch(host: str, target: str, limits: Limits) -> bytes:
    deadline = time.monotonic() + limits.media_seconds
    address = public_address(host)
    secure = ssl.create_default_context()
    with socket.create_connection((address, 443), timeout=limits.media_seconds) as plain:
        with secure.wrap_socket(plain, server_hostname=host) as wrapped:
            connection = http.client.HTTPConnection(host, timeout=limits.media_seconds)
            connection.sock = wrapped
            connection.request("GET", target, headers={"User-Agent": "gemma-jax"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"status {answer.status}")
            return _bounded(answer, limits.body_bytes, deadline)


def _bounded(answer, most: int, deadline: float) -> bytes:
    parts, size = [], 0
    while part := answer.read(1 << 16):
        size += len(part)
        parts.append(part)
        if size > most or time.monotonic() > deadline:
            raise ValueError("too much, or too slow")
    return b"".join(parts)


def public_address(host: str) -> str:
    """One address of a host, if all of them are public."""
    found = socket.getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(ipaddress.ip_address(one).is_global for one in addresses):
        raise ValueError(f"{host} is not public")
    return addresses[0]
