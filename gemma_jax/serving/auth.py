"""Who may ask: keys, compared in constant time."""

import base64
import binascii
import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from pathlib import Path

from gemma_jax.serving.errors import ApiError

VARIABLE = "GEMMA_JAX_API_KEYS"  # of the environment; keys, separated by commas
SHORTEST = 8  # characters of a key
_NAME = re.compile(r"[\w.@-]{1,64}")


class Keys:
    """Knows the keys of a server, and whose they are. Without any, everybody may ask.

    A file has one key a line, alone or after a name and a space; `#` begins a comment. Names stand
    for their keys in metrics and logs, where no key is ever seen.

    Examples:
      >>> keys = Keys({"alice": "sk-of-alice"})
      >>> keys.owner({"authorization": "Bearer sk-of-alice"})
      'alice'
    """

    def __init__(self, by_name: Mapping[str, str]):
        self._digests = [(name, _digest(key)) for name, key in by_name.items()]

    @classmethod
    def read(cls, file: Path | None, environment: Mapping[str, str] = os.environ) -> "Keys":
        """The keys of a file, else those of the environment.

        Raises:
          ValueError: A key that is too short, a name twice, a file without keys.
        """
        if file is not None:
            lines = [line.partition("#")[0].split() for line in file.read_text("utf-8").split("\n")]
            source, lines = str(file), [line for line in lines if line]
        else:
            given = environment.get(VARIABLE)
            source, lines = VARIABLE, [[key.strip()] for key in (given or "").split(",")]
            if given is None:
                return cls({})
        return cls(_named(lines, source))

    def __bool__(self) -> bool:
        return bool(self._digests)

    def owner(self, headers: Mapping[str, str]) -> str:
        """Whose key a request has; `""` where there are no keys.

        A key comes as `Authorization: Bearer KEY`, as the API has it, or as the password of
        `Basic`, which browsers ask for.

        Raises:
          ApiError: 401.
        """
        if not self._digests:
            return ""
        given, found = _digest(_given(headers.get("authorization", ""))), None
        for name, digest in self._digests:  # all of them, whichever it is
            if hmac.compare_digest(given, digest):
                found = name
        if found is None:
            raise ApiError(
                "a valid API key is needed, as in 'Authorization: Bearer KEY'",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="gemma-jax", charset="UTF-8"'},
            )
        return found


def _named(lines: list[list[str]], source: str) -> dict[str, str]:
    keys: dict[str, str] = {}
    for i, words in enumerate(lines, 1):
        name, key = (f"key-{i}", words[0]) if len(words) == 1 else (words[0], words[-1])
        if len(words) > 2 or not _NAME.fullmatch(name):
            raise ValueError(f"{source}: entry {i}: expected a key, or a name and a key")
        if len(key) < SHORTEST or not key.isascii():
            raise ValueError(
                f"{source}: entry {i}: expected a key of at least {SHORTEST} ASCII characters"
            )
        if name in keys:
            raise ValueError(f"{source}: entry {i}: the name {name} is there twice")
        keys[name] = key
    if not keys:
        raise ValueError(f"{source} holds no key; give one a line")
    return keys


def _digest(key: str) -> bytes:
    """Of one length, so that comparing tells nothing of the key's."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _given(header: str) -> str:
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        decoded = base64.b64decode(value.strip(), validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return ""
    return decoded.partition(":")[2]
