"""The chat template that a checkpoint brings along.

The templates of the published Gemma models are known by their text and run as code of ours
(`chat.py`). Any other is a program that somebody else wrote: it runs in jinja2's sandbox, in a
process of its own with limits on time, memory and output (`jinja_worker.py`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import chat
from .chat import GEMMA3_MEDIA, Message

SECONDS = 20
WORKER = Path(__file__).with_name("jinja_worker.py")


@dataclass(frozen=True)
class GemmaTemplate:
    """What tells the published templates apart: whether there may be a system message."""

    models: str
    system: bool


_GEMMA2 = GemmaTemplate("Gemma 1 and 2", system=False)
_GEMMA3 = GemmaTemplate("Gemma 3", system=True)
_GEMMA3N = GemmaTemplate("Gemma 3n", system=True)
# sha256 of the text, with one "\n" per line break and none at the end, as jinja2 reads it. Each is
# there twice: as published, with line breaks inside of quotes, and with "\\n" in their place. The
# texts are in tests/text/data/gemma_templates.json with their sources; jinja2 renders them in
# tests/text/test_chat_templates.py, and ours must say the same.
GEMMA: Mapping[str, GemmaTemplate] = {
    "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6": _GEMMA2,
    "1e51d5c0fec2f83da1953fb850b7b532b7da02d0dc35f9201e671e0b9a35a123": _GEMMA2,
    "8d9e3a3c114fb2053ec500184677af4f7e5f8ec2582443cd535834e68b3ade29": _GEMMA3,
    "86327804b5430b642274fe55ba95199e91cf7eca7b1e1240ca5469f23839e223": _GEMMA3,
    "9cae32b35b45454e9bd3673b4011701b77d38843622ab9b6e3f930bc503cf28a": _GEMMA3N,
    "3ff5ef9073d6921dc33cd9217b353eb0bd88f09bea6421b5df1451a325b23c5e": _GEMMA3N,
}


@dataclass(frozen=True)
class ChatTemplate:
    """Renders chat messages as a checkpoint says.

    Attributes:
      text: In the language of jinja2.
      origin: The file or key that it comes from.
      tokens: What it may ask for by name: `bos_token` and its like.
      add_bos: Whether <bos> is put in front where the template puts none. transformers never does;
        llama.cpp does, where a file asks for it.
    """

    text: str
    origin: str
    tokens: Mapping[str, str]
    add_bos: bool = False

    @property
    def gemma(self) -> GemmaTemplate | None:
        """Which of the published templates it is, if any."""
        normal = self.text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
        return GEMMA.get(hashlib.sha256(normal.encode()).hexdigest())

    @property
    def summary(self) -> str:
        """For people: whose it is, and where it lies."""
        whose = "its own, run by jinja2" if self.gemma is None else f"that of {self.gemma.models}"
        return f"{whose} ({self.origin})"

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        media: Mapping[str, str] = GEMMA3_MEDIA,
    ) -> str:
        """The prompt of a whole conversation; see `chat.render`.

        Raises:
          ValueError: Messages that the template refuses, or would pass over; a template that is
            broken, or takes too long.
          ImportError: The template needs jinja2, which is not there.
        """
        if (known := self.gemma) is not None:
            if not known.system and messages and messages[0].get("role") == "system":
                raise ValueError(f"the chat template of {known.models} has no system role")
            return chat.render(messages, add_generation_prompt=add_generation_prompt, media=media)
        plain = [chat.plain(message, media) for message in messages]
        text = self._run(plain, add_generation_prompt)
        for kind, marker in media.items():
            given = sum(chat.count(message, kind) for message in plain)
            written = sum(chat.typed(message, marker) for message in plain)
            if given and text.count(marker) != given + written:
                raise ValueError(
                    f"the chat template ({self.origin}) has no place for {kind}s: it wrote "
                    f"{text.count(marker)} times {marker} for {given}"
                )
        if "{'type': 'text'" in text:
            raise ValueError(
                f"the chat template ({self.origin}) takes contents that are texts, not lists; give "
                "each message one text"
            )
        return text

    def _run(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if importlib.util.find_spec("jinja2") is None:
            raise ImportError(
                f"this checkpoint has a chat template of its own ({self.origin}), which needs "
                'jinja2: pip install "gemma-jax[chat]"'
            )
        variables = {**self.tokens, "messages": messages, "tools": None, "documents": None}
        task = {
            "template": self.text,
            "variables": variables | {"add_generation_prompt": add_generation_prompt},
            "seconds": SECONDS,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-P", str(WORKER)],
                input=json.dumps(task).encode(),
                capture_output=True,
                timeout=SECONDS,
                check=False,
            )
            answer = json.loads(done.stdout) if done.returncode == 0 else {}
        except subprocess.TimeoutExpired:
            answer = {"error": f"takes more than {SECONDS} s"}
        if "text" not in answer:
            reason = answer.get("error", "takes too much memory or time")
            raise ValueError(f"the chat template ({self.origin}) {reason}")
        return answer["text"]
