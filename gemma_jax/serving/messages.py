"""Messages of the API as the messages that prompts are made of."""

from dataclasses import dataclass

from gemma_jax.serving.fields import Fields
from gemma_jax.serving.media import MediaReader
from gemma_jax.serving.tools import answered_call, read_calls

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Conversation:
    """Messages as `PromptReader.chat` takes them, plus what they say of their pictures.

    Attributes:
      pan_and_scan: Whether crops of elongated pictures are added; `None`: as the checkpoint says.
    """

    messages: list[dict]
    pan_and_scan: bool | None = None


def read_messages(fields: Fields, media: MediaReader) -> Conversation:
    """The field `messages`.

    Raises:
      ApiError: No messages, or something in one of them that the model would not see.
    """
    items = fields.items("messages", most=media.limits.messages)
    if not items:
        raise fields.error("expected at least one message", "messages")
    details: set[bool] = set()
    calls: set[str] = set()
    read = [
        _message(Fields(item, f"messages[{i}]"), media, details, calls)
        for i, item in enumerate(items)
    ]
    if len(details) > 1:
        raise fields.error("all pictures of a request must have one detail", "messages")
    return Conversation(read, details.pop() if details else None)


def _message(fields: Fields, media: MediaReader, details: set[bool], calls: set[str]) -> dict:
    """One message; `calls` has the ids of those that were made, and gets those of this one."""
    role = fields.text("role", choices=ROLES)
    if role is None:
        raise fields.error("is missing", "role")
    fields.only("name", because="Gemma's format has no names of speakers")
    fields.only("refusal", because="Gemma's format has no refusals")
    fields.only("audio", because="the model does not speak")
    fields.only("annotations", [], because="answers have none")
    fields.only("function_call", because="give tool_calls")
    message: dict = {"role": "system" if role == "developer" else role}
    if role == "tool":
        message["tool_call_id"] = answered_call(fields, "tool_call_id", calls)
    if role == "assistant" and (made := read_calls(fields, media.limits)):
        message["tool_calls"] = made
        calls.update(call["id"] for call in made)
    optional = "tool_calls" in message and fields.raw("content") is None
    message["content"] = "" if optional else read_content(fields, message["role"], media, details)
    if role == "assistant":
        fields.raw("parsed")  # the openai client's own word for the same content
    fields.close()
    return message


def read_content(
    fields: Fields, role: str, media: MediaReader, details: set[bool]
) -> str | list[dict]:
    """What one message says: a text, or of the user parts."""
    value = fields.raw("content")
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise fields.error("expected a text or a list of parts", "content")
    parts = [
        _part(Fields(part, f"{fields.where}.content[{i}]"), media, details)
        for i, part in enumerate(value)
    ]
    if role != "user":
        if any(part["type"] != "text" for part in parts):
            raise fields.error("pictures and sounds come from the user alone", "content")
        return "".join(part["text"] for part in parts)
    return parts


def _part(fields: Fields, media: MediaReader, details: set[bool]) -> dict:
    kind = fields.text("type", choices=("text", "image_url", "input_audio"))
    if kind is None:
        raise fields.error("is missing", "type")
    if kind == "text":
        text = fields.text("text")
        if text is None:
            raise fields.error("is missing", "text")
        part = {"type": "text", "text": text}
    elif kind == "image_url":
        part = {"type": "image", "image": _image(fields, media, details)}
    else:
        part = {"type": "audio", "audio": _audio(fields, media)}
    fields.close()
    return part


def _image(fields: Fields, media: MediaReader, details: set[bool]):
    value = fields.raw("image_url")
    if isinstance(value, str):
        return media.image(value, fields.path("image_url"))
    inner = fields.object("image_url")
    if inner is None:
        raise fields.error("is missing", "image_url")
    url = inner.text("url")
    if url is None:
        raise inner.error("is missing", "url")
    detail = inner.text("detail", "auto", choices=("auto", "low", "high"))
    if detail != "auto":
        details.add(detail == "high")
    inner.close()
    return media.image(url, inner.path("url"))


def _audio(fields: Fields, media: MediaReader):
    inner = fields.object("input_audio")
    if inner is None:
        raise fields.error("is missing", "input_audio")
    data = inner.text("data")
    inner.text("format", choices=("wav", "mp3", "flac", "ogg"))  # the bytes say it again
    if data is None:
        raise inner.error("is missing", "data")
    inner.close()
    return media.audio(data, inner.path("data"))
