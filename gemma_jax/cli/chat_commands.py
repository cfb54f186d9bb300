"""What may be entered in `gemma-jax chat`: messages, and commands between them."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from gemma_jax.cli import progress
from gemma_jax.cli.errors import one_line

if TYPE_CHECKING:
    from gemma_jax.inference.conversation import Conversation

COMMANDS = {
    "/image FILE": "puts an image in front of the next message",
    "/audio FILE": "puts a sound in front of the next message",
    "/temperature X": "chooses the next answers at another temperature",
    "/save FILE": "writes the conversation to a new file, as JSON",
    "/reset": "starts anew",
    "/help": "shows this",
    "/quit": "leaves, as the end of input does",
}


class Chat:
    """A conversation, and what the commands between its messages change.

    Args:
      start: Makes a new conversation.
      max_new_tokens: Bound on each answer.
    """

    def __init__(self, start: "Callable[[], Conversation]", max_new_tokens: int):
        self._start, self._max_new_tokens = start, max_new_tokens
        self._conversation, self._media = start(), []

    def enter(self, line: str) -> None:
        """Does what a line says, which is a message or a command."""
        word, _, rest = line.partition(" ")
        if not re.fullmatch(r"/\w*", word):  # a path, say, is no command
            with _lenient(", or /reset"):  # the conversation may have outgrown its room
                self._say(line)
            self._media = []
            return
        with _lenient():
            run = {
                "/image": self._image,
                "/audio": self._audio,
                "/temperature": self._temperature,
                "/save": self._save,
                "/reset": self._reset,
                "/help": self._help,
            }.get(word)
            if run is None:
                raise ValueError(f"there is no command {word}; there are {', '.join(COMMANDS)}")
            run(rest.strip())

    def _say(self, line: str) -> None:
        content = [*self._media, line] if self._media else line
        with progress.compiling() as bar:
            answer = self._conversation.stream(content, max_new_tokens=self._max_new_tokens)
            for piece in answer:
                bar.stop()
                sys.stdout.write(piece)
                sys.stdout.flush()
        print()

    def _image(self, file: str) -> None:
        from gemma_jax.multimodal.image_prompt import require_vision
        from gemma_jax.vision.images import Image

        require_vision(self._conversation.model.cfg.vision)
        image = Image(_path(file, "/image picture.png"))
        self._media.append({"type": "image", "image": image, "path": file})
        tell(f"{file}, {image.width} x {image.height} pixels, goes with your next message")

    def _audio(self, file: str) -> None:
        from gemma_jax.cli.common import read_clip
        from gemma_jax.multimodal.audio_prompt import require_audio

        require_audio(self._conversation.model.cfg.audio)
        clip = read_clip(_path(file, "/audio question.wav"))
        self._media.append({"type": "audio", "audio": clip, "path": file})
        tell(f"{file}, {clip.seconds:.1f} s, goes with your next message")

    def _temperature(self, value: str) -> None:
        try:
            number = float(value)
        except ValueError:
            raise ValueError("expected a number, as in /temperature 0.7") from None
        sampling = replace(self._conversation.sampling, temperature=number)
        self._conversation.sampling = sampling

    def _save(self, file: str) -> None:
        conversation = self._conversation
        system = [{"role": "system", "content": conversation.system}] if conversation.system else []
        messages = [*system, *map(_without_media, conversation.messages)]
        with open(_path(file, "/save chat.json"), "x", encoding="utf-8") as target:
            json.dump(messages, target, ensure_ascii=False, indent=2)
            target.write("\n")
        tell(f"{len(messages)} messages are in {file}")

    def _reset(self, _: str) -> None:
        sampling = self._conversation.sampling
        self._conversation, self._media = self._start(), []
        self._conversation.sampling = sampling

    def _help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        for name, what in COMMANDS.items():
            tell(f"{name:<{width}}  {what}")


@contextmanager
def _lenient(way_on: str = "") -> Iterator[None]:
    """Lets the chat go on after Ctrl-C, and on a terminal after an error, which becomes a line."""
    try:
        yield
    except KeyboardInterrupt:
        print()  # what was written stays part of the conversation
    except (ValueError, OSError, ImportError) as error:
        if not sys.stdin.isatty():
            raise
        tell(f"error: {one_line(error)}{way_on}")


def tell(line: str) -> None:
    """Says something that is no answer."""
    print(line, file=sys.stderr)


def _path(file: str, example: str) -> str:
    if not file:
        raise ValueError(f"expected a file, as in {example}")
    return os.path.expanduser(file)


def _without_media(message: Mapping) -> Mapping:
    """A message as JSON can hold it: an image or a sound is named by its file."""
    content = message["content"]
    if isinstance(content, str):
        return message
    items = [
        {"type": "text", "text": item}
        if isinstance(item, str)
        else {"type": item["type"], "path": item["path"]}
        for item in content
    ]
    return {**message, "content": items}
