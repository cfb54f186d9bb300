"""What a row of a file says.

One JSON object per line, of one of these kinds:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    {"text": "Once upon a time"}
    {"prompt": "2 + 2 =", "completion": " 4"}
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    {"messages": [...], "chosen": "Hello!", "rejected": "What?"}

Contents are texts or lists of items, as in `gemma_jax.text.chat`. Prompts, completions, chosen and
rejected answers may also be lists of messages; a row with both answers as whole conversations need
not say the prompt. A preference may bring what a reference model says of its two answers,
`"ref_chosen_logps"` and `"ref_rejected_logps"` (as trl calls them: nats, summed over the answer).

Images and sounds are files, by paths that count from the folder of the row's own file: `{"type":
"image", "image": "cat.png"}`; or `"images"` and `"audio"` of the row, in the order of the markers
in a text or of items without a path.

A key that is not understood is refused, and so is a row of two kinds at once.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_jax.text import items_of

KINDS = ("messages", "text", "prompt and completion")
_ITEM_KEYS = {"text": {"text"}, "image": {"image", "path"}, "audio": {"audio", "path"}}
_MEDIA_KEYS = {"images": "image", "audio": "audio"}
_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
      messages: As `render_chat` takes them, files as paths.
      given: The first so many messages are not trained on: the prompt of a completion.
    """

    messages: Sequence[Mapping[str, Any]]
    given: int = 0


@dataclass(frozen=True)
class Plain:
    """A text, or a prompt and what comes after it.

    Attributes:
      prompt: `None` for a text, all of which is trained.
      media: Name of a modality -> files, in the order of the markers in the prompt or text.
    """

    text: str
    prompt: str | None = None
    media: Mapping[str, Sequence[Path]] = field(default_factory=dict)


Example = Chat | Plain


def examples_of(
    row: Mapping[str, Any], folder: Path, *, pairs: bool, ignore: Sequence[str] = ()
) -> tuple[Example, ...]:
    """The example of a row; or two, chosen and rejected.

    Raises:
      ValueError: Keys that are unknown, missing or together make no sense; values of wrong types.
    """
    row = {key: value for key, value in row.items() if key not in ignore}
    media = _media(row, folder)
    row = {key: value for key, value in row.items() if key not in _MEDIA_KEYS}
    keys = set(row)
    if pairs:
        return _pair(row, keys - set(_REFERENCE), media, folder, ignore)
    if keys & {"chosen", "rejected"}:
        raise ValueError("the row is a preference; set pairs, for an objective that reads them")
    if keys == {"messages"}:
        return (Chat(_messages(row["messages"], folder, ignore, media)),)
    if keys == {"text"}:
        return (Plain(_text(row, "text"), media=media),)
    if keys == {"prompt", "completion"}:
        return (_completed(row["prompt"], row["completion"], media, folder, ignore),)
    raise ValueError(_wrong_keys(keys, KINDS, {"messages", "text", "prompt", "completion"}))


def _pair(row, keys, media, folder, ignore) -> tuple[Example, Example]:
    answers = row.get("chosen"), row.get("rejected")
    kinds = ("prompt, chosen and rejected", "messages, chosen and rejected")
    known = {"prompt", "messages", "chosen", "rejected"}
    if keys == {"chosen", "rejected"} and all(isinstance(one, list) for one in answers):
        chosen, rejected = (_messages(one, folder, ignore, media) for one in answers)
        same = [a == b for a, b in zip(chosen, rejected)]
        given = same.index(False) if False in same else len(same)
        if not given:
            raise ValueError("chosen and rejected have no message in common; say the prompt")
        return Chat(chosen, given), Chat(rejected, given)
    if keys not in ({"prompt", "chosen", "rejected"}, {"messages", "chosen", "rejected"}):
        raise ValueError(_wrong_keys(keys, kinds, known))
    prompt = row.get("prompt", row.get("messages"))
    if "messages" in keys and not isinstance(prompt, list):
        raise ValueError(f"messages must be a list, got {type(prompt).__name__}")
    chosen, rejected = (_completed(prompt, one, media, folder, ignore) for one in answers)
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same")
    return chosen, rejected


def reference_logps_of(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """What a reference gives the chosen and the rejected answer, if the row says so; nats.

    Raises:
      ValueError: One without the other, or no such numbers.
    """
    found = [row[key] for key in _REFERENCE if key in row]
    if not found:
        return None
    numbers = [one for one in found if isinstance(one, int | float) and not isinstance(one, bool)]
    if len(numbers) < 2 or not all(-math.inf < one <= 0 for one in numbers):
        raise ValueError(f"{' and '.join(_REFERENCE)} must be two numbers, none above 0")
    return numbers[0], numbers[1]


def _completed(prompt: Any, completion: Any, media, folder: Path, ignore) -> Example:
    """A prompt with what comes after it: two texts, or messages and an answer."""
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise ValueError("the completion is empty")
        return Plain(completion, prompt, media)
    if not isinstance(prompt, list):
        raise ValueError(
            "expected a prompt and its completion as two texts, or the prompt as messages; got "
            f"{type(prompt).__name__} and {type(completion).__name__}"
        )
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(completion, list):
        raise ValueError(f"expected an answer as text or messages, got {completion!r:.80}")
    return Chat(_messages([*prompt, *completion], folder, ignore, media), len(prompt))


def _wrong_keys(keys: set[str], kinds: Sequence[str], known: set[str]) -> str:
    if unknown := sorted(keys - known):
        return f"unknown key {', '.join(map(repr, unknown))}; name it in ignore if it may be"
    has = ", ".join(sorted(keys)) or "nothing"
    return f"expected {' or '.join(kinds)}, got {has}"


def _text(row: Mapping[str, Any], key: str) -> str:
    if not isinstance(row[key], str):
        raise ValueError(f"{key} must be a text, got {type(row[key]).__name__}")
    if not row[key]:
        raise ValueError(f"{key} is empty")
    return row[key]


def _media(row: Mapping[str, Any], folder: Path) -> dict[str, list[Path]]:
    media = {}
    for key, name in _MEDIA_KEYS.items():
        if key not in row:
            continue
        if not isinstance(row[key], list) or not all(isinstance(p, str) for p in row[key]):
            raise ValueError(f"{key} must be a list of paths of files, got {row[key]!r:.80}")
        media[name] = [folder / path for path in row[key]]
    return media


def _messages(messages: Any, folder: Path, ignore, media) -> list[dict[str, Any]]:
    """Messages with paths in the place of their names, and files of the row where they belong."""
    if not isinstance(messages, list):
        raise ValueError(f"messages must be a list, got {type(messages).__name__}")
    files = {name: iter(paths) for name, paths in media.items()}
    read = [_message(message, folder, ignore, files) for message in messages]
    if left := [name for name, rest in files.items() if next(rest, None) is not None]:
        raise ValueError(f"the row has more {left[0]} files than items without a path")
    return read


def _message(message: Any, folder: Path, ignore, files) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"expected a message {{'role', 'content'}}, got {message!r:.80}")
    message = {key: value for key, value in message.items() if key not in ignore}
    if set(message) != {"role", "content"}:
        raise ValueError(
            f"a message has a role and a content, got {', '.join(message) or 'nothing'}; name in "
            "ignore what may be ignored"
        )
    content = message["content"]
    if isinstance(content, list):
        content = [_item(item, folder, ignore, files) for item in content]
    elif not isinstance(content, str):
        raise ValueError(f"a content is a text or a list, got {content!r:.80}")
    return {"role": message["role"], "content": content}


def _item(item: Any, folder: Path, ignore, files) -> Any:
    if isinstance(item, str):
        return item
    if not isinstance(item, dict) or item.get("type") not in _ITEM_KEYS:
        raise ValueError(f"expected items of type text, image or audio, got {item!r:.80}")
    item = {key: value for key, value in item.items() if key not in ignore}
    kind = item["type"]
    sources = set(item) - {"type"}
    if unknown := sources - _ITEM_KEYS[kind]:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r} in an item of type {kind}")
    if kind == "text":
        return item
    if not sources:
        path = next(files.get(kind, iter(())), None)
        if path is None:
            raise ValueError(f"an item of type {kind} without a path, and no file for it")
        return {"type": kind, kind: path}
    source = item[min(sources)] if len(sources) == 1 else None
    if not isinstance(source, str):
        raise ValueError(f"an item of type {kind} has one path of a file, got {item!r:.80}")
    return {"type": kind, kind: folder / source}


def has_media(message: Mapping[str, Any]) -> bool:
    """Whether a message holds anything but text."""
    return any(items_of([message], kind) for kind in ("image", "audio"))
