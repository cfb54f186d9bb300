"""Gemma's chat format: messages to the text of a prompt, character for character the official one.

The format is the `chat_template` in the tokenizer configuration of the released models:

    <bos><start_of_turn>user
    {system}

    {user}<end_of_turn>
    <start_of_turn>model
    {answer}<end_of_turn>

There is no system role; a system message is put in front of the first user message. Messages are
dicts as in Hugging Face's API, `{"role": "user", "content": "Hi"}`. A content is a text, an image,
a sound, or a list of items: `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`,
`{"type": "audio", "audio": ...}`, or texts, images and sounds themselves, `[Path("cat.png"), "What
is this?"]`. A string is always a text, never a path; a path is that of a sound if its name ends as
those of sounds do (`SOUND_FILES`), else of an image.

What the template would pass over in silence (unknown roles and item types, a system message that no
user message follows) is refused here: the model would not see what the caller wrote.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

BOS = "<bos>"
END_OF_TURN = "<end_of_turn>\n"
GENERATION_PROMPT = "<start_of_turn>model\n"

# How an item that is no text is written. The model's processor later expands the marker into soft
# tokens; Gemma 3 expands its start marker, Gemma 3n the soft token itself.
GEMMA3_MEDIA: Mapping[str, str] = {"image": "<start_of_image>"}
GEMMA3N_MEDIA: Mapping[str, str] = {"image": "<image_soft_token>", "audio": "<audio_soft_token>"}

Message = Mapping[str, object]
_ROLES = {"user": "user", "assistant": "model", "model": "model"}
SOUND_FILES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aiff", ".aif", ".m4a", ".aac")
_SOURCES = ("path", "url")  # where an item may name what it holds, beside its own type


def render(
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    media: Mapping[str, str] = GEMMA3_MEDIA,
) -> str:
    """The prompt of a whole conversation, beginning with "<bos>".

    Args:
      messages: an optional "system" message, then "user" and "assistant" (or "model") in turn.
      add_generation_prompt: end with the opening of a model turn, so that the model answers.
      media: item type -> marker.

    Raises:
      ValueError: roles out of turn or unknown, or a content that is neither text nor items.
    """
    messages = list(messages)
    system = messages.pop(0) if messages and _role(messages[0]) == "system" else None
    if not messages:
        raise ValueError("expected at least one user message, got none")
    turns = []
    for i, message in enumerate(messages):
        if (_role(message) == "user") != (i % 2 == 0) and _role(message) in (*_ROLES, "system"):
            raise ValueError(
                "Conversation roles must alternate user/assistant/user/assistant/...; "
                f"message {i} after the system message, if any, is from {_role(message)!r}"
            )
        turns.append(render_turn(message, system=None if i else system, media=media))
    return BOS + "".join(turns) + (GENERATION_PROMPT if add_generation_prompt else "")


def render_turn(
    message: Message, *, system: Message | None = None, media: Mapping[str, str] = GEMMA3_MEDIA
) -> str:
    """One turn, markers included; `system` goes in front of its content.

    Raises:
      ValueError: an unknown role or content.
    """
    role = _role(message)
    if role not in _ROLES:
        raise ValueError(
            f"expected role {' or '.join(map(repr, _ROLES))} ('system' in front only), got {role!r}"
        )
    prefix = "" if system is None else _system_text(system)
    return f"<start_of_turn>{_ROLES[role]}\n{prefix}{_content(message, media)}{END_OF_TURN}"


def render_next(
    message: Message,
    *,
    first: bool,
    system: Message | None = None,
    media: Mapping[str, str] = GEMMA3_MEDIA,
) -> str:
    """What to append to a conversation, so that the model answers this user message.

    For a cache that is kept between turns: it holds the earlier increments and answers, and has not
    seen the <end_of_turn> at which the last answer stopped. Increments and stripped answers, strung
    together, are `render` of the whole conversation.

    Args:
      message: the new message of the user.
      first: nothing precedes it; only then may there be a `system` message.
    """
    if _role(message) != "user":
        raise ValueError(f"expected a message from 'user', got {_role(message)!r}")
    if system is not None and not first:
        raise ValueError("expected a system message only with first=True")
    before = BOS if first else END_OF_TURN
    return before + render_turn(message, system=system, media=media) + GENERATION_PROMPT


def images_of(messages: Sequence[Message]) -> list[object]:
    """The images of a conversation in the order of their markers in `render(messages)`.

    Returns:
      What the messages hold in their places: paths, arrays, whatever `gemma_jax.Image` takes.

    Raises:
      ValueError: an item of type "image" that names no image.
    """
    return items_of(messages, "image")


def items_of(messages: Sequence[Message], kind: str) -> list[object]:
    """The items of one type in a conversation, in the order of their markers in `render(messages)`.

    Returns:
      What the messages hold in their places.

    Raises:
      ValueError: An item of this type that names nothing.
    """
    items = (item for message in messages for item in _items(message))
    return [_source(item) for item in items if item.get("type") == kind]


def plain(message: Message, media: Mapping[str, str]) -> dict[str, object]:
    """The message as templates expect it: without what its items hold, and no more keys.

    A content that is one text stays one.

    Raises:
      ValueError: an item that is neither a text nor of a type of `media`.
    """
    role = {"model": "assistant"}.get(_role(message), _role(message))
    others = {key: value for key, value in message.items() if key not in ("role", "content")}
    content = message.get("content")
    if not isinstance(content, str):
        content = [_bare(item, media) for item in _items(message)]
    return {"role": role, "content": content, **others}


def _bare(item: Mapping[str, object], media: Mapping[str, str]) -> dict[str, object]:
    _marked(item, media)  # is it one that can be?
    return (
        {"type": "text", "text": item["text"]} if item["type"] == "text" else {"type": item["type"]}
    )


def count(message: Message, kind: str) -> int:
    """Items of one type in a message."""
    return sum(item.get("type") == kind for item in _items(message))


def typed(message: Message, marker: str) -> int:
    """How often a marker stands in the texts of a message."""
    texts = [item["text"] for item in _items(message) if item.get("type") == "text"]
    return sum(str(text).count(marker) for text in texts)


def _role(message: object) -> str:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"expected a message {{'role': ..., 'content': ...}}, got {message!r:.200}"
        )
    return message["role"]


def _content(message: Message, media: Mapping[str, str]) -> str:
    return "".join(_marked(item, media) for item in _items(message))


def _marked(item: Mapping[str, object], media: Mapping[str, str]) -> str:
    kind = item.get("type")
    if kind == "text" and isinstance(item.get("text"), str):
        return item["text"].strip()
    if kind in media:
        return media[kind]
    raise ValueError(
        f"expected items of type 'text' (with a text) or {list(media)}, got {item!r:.200}"
    )


def _system_text(message: Message) -> str:
    if _role(message) != "system":
        raise ValueError(f"expected a message from 'system', got {_role(message)!r}")
    items = _items(message)
    # The template takes the text of the first item and drops the rest.
    if len(items) != 1 or not isinstance(items[0].get("text"), str):
        raise ValueError(
            f"expected a system message with one text, got {message.get('content')!r:.200}"
        )
    return items[0]["text"] + "\n\n"  # not stripped, unlike every other text


def _items(message: Message) -> list[Mapping[str, object]]:
    """The content, in whatever form it comes, as items of Hugging Face's form."""
    content = message.get("content")
    if isinstance(content, str) or medium_of(content):
        content = [content]
    if not isinstance(content, Sequence):
        raise ValueError(
            "Invalid content type: expected text, an image, a sound or a list of items, "
            f"got {content!r:.200}"
        )
    return [_item(part) for part in content]


def _item(part: object) -> Mapping[str, object]:
    if isinstance(part, Mapping):
        return part
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if kind := medium_of(part):
        return {"type": kind, kind: part}
    raise ValueError(
        "Invalid content type: expected a text, an image, a sound or an item of one of them, "
        f"got {part!r:.200}"
    )


def medium_of(part: object) -> str | None:
    """Whether this is an `"image"` or an `"audio"` clip without an item around it, or neither.

    Its content is not looked at.
    """
    # By what they have, so that neither Pillow nor JAX need be there: `gemma_jax.Audio` has a rate,
    # `gemma_jax.Image` has `rgb`, arrays and PIL's images have the others.
    if hasattr(part, "sampling_rate") or _is_sampled(part):
        return "audio"
    if isinstance(part, os.PathLike) and os.fsdecode(part).lower().endswith(SOUND_FILES):
        return "audio"
    looks = ("rgb", "__array__", "__array_interface__")
    is_file = isinstance(part, (bytes, bytearray, memoryview, os.PathLike))
    return "image" if is_file or any(hasattr(part, name) for name in looks) else None


def _is_sampled(part: object) -> bool:
    """Whether these are samples and their rate."""
    is_pair = isinstance(part, tuple) and len(part) == 2
    return is_pair and hasattr(part[0], "__array__") and isinstance(part[1], int)


def _source(item: Mapping[str, object]) -> object:
    kind = item["type"]
    keys = [kind, *_SOURCES]
    found = next((item[key] for key in keys if item.get(key) is not None), None)
    if found is None:
        raise ValueError(
            f"expected an {kind} item with one of {keys}, got {item!r:.200}; "
            f"{{'type': {kind!r}}} alone is a placeholder"
        )
    return found
