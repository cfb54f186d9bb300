"""Items that go into and come out of /v1/responses."""

import secrets
from collections.abc import Iterable, Iterator

from gemma_jax.serving.fields import Fields
from gemma_jax.serving.media import MediaReader
from gemma_jax.serving.messages import Conversation
from gemma_jax.serving.tools import Written, answered_call, call_of, required
from gemma_jax.text.tool_calls import CallDelta, TextDelta

KINDS = ("message", "function_call", "function_call_output")
ROLES = ("system", "developer", "user", "assistant")


def read_input(fields: Fields, media: MediaReader) -> Conversation:
    """The fields `instructions` and `input` as messages of chat.

    Raises:
      ApiError: No input, items of other types, or something that the model would not see.
    """
    instructions, given = fields.text("instructions"), fields.raw("input")
    messages = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return Conversation([*messages, {"role": "user", "content": given}])
    items = fields.items("input", most=media.limits.messages)
    if not items:
        raise fields.error("expected a text or at least one item", "input")
    reader = _ItemReader(media, messages)
    for i, item in enumerate(items):
        reader.read(Fields(item, f"input[{i}]"))
    if len(reader.details) > 1:
        raise fields.error("all pictures of a request must have one detail", "input")
    return Conversation(messages, reader.details.pop() if reader.details else None)


class _ItemReader:
    """Adds items to messages: calls of one answer are one message there."""

    def __init__(self, media: MediaReader, messages: list[dict]):
        self._media, self._messages = media, messages
        self._calls: set[str] = set()
        self.details: set[bool] = set()

    def read(self, fields: Fields) -> None:
        kind = fields.text("type", "message", choices=KINDS)
        fields.raw("id")  # names an item to those who keep them
        fields.text("status", choices=("in_progress", "completed", "incomplete"))
        if kind == "message":
            self._message(fields)
        elif kind == "function_call":
            self._call(fields)
        else:
            call_id = answered_call(fields, "call_id", self._calls)
            content = self._content(fields, "output", "tool")
            self._messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        fields.close()

    def _message(self, fields: Fields) -> None:
        role = fields.text("role", choices=ROLES)
        if role is None:
            raise fields.error("is missing", "role")
        fields.only("phase", "final_answer", because="Gemma's format has one kind of answer")
        role = "system" if role == "developer" else role
        content = self._content(fields, "content", role)
        last = self._messages[-1] if self._messages else {}
        if role == "system" and last.get("role") == "system":  # behind the instructions
            last["content"] = f"{last['content']}\n\n{content}"
        else:
            self._messages.append({"role": role, "content": content})

    def _call(self, fields: Fields) -> None:
        call_id, name = required(fields, "call_id"), required(fields, "name")
        call = call_of(call_id, name, fields.text("arguments", ""), fields)
        fields.raw("parsed_arguments")  # the openai client's own word for the same arguments
        if not self._messages or self._messages[-1]["role"] != "assistant":
            self._messages.append({"role": "assistant", "content": ""})
        self._messages[-1].setdefault("tool_calls", []).append(call)
        self._calls.add(call_id)

    def _content(self, fields: Fields, name: str, role: str) -> str | list[dict]:
        value = fields.raw(name)
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise fields.error("expected a text or a list of parts", name)
        parts = [
            self._part(Fields(part, f"{fields.path(name)}[{i}]"), role)
            for i, part in enumerate(value)
        ]
        return parts if role == "user" else "".join(part["text"] for part in parts)

    def _part(self, fields: Fields, role: str) -> dict:
        known = {"user": ("input_text", "input_image"), "assistant": ("output_text",)}
        kind = fields.text("type", choices=known.get(role, ("input_text",)))
        if kind is None:
            raise fields.error("is missing", "type")
        if kind == "input_image":
            part = {"type": "image", "image": self._image(fields)}
        else:
            text = fields.text("text")
            if text is None:
                raise fields.error("is missing", "text")
            part = {"type": "text", "text": text}
            fields.only("annotations", [], because="answers have none")
            fields.only("logprobs", [], because="they are not read back")
            fields.raw("parsed")  # the openai client's own word for the same text
        fields.close()
        return part

    def _image(self, fields: Fields):
        fields.only("file_id", because="this server keeps no files; give image_url")
        url = required(fields, "image_url")
        detail = fields.text("detail", "auto", choices=("auto", "low", "high"))
        if detail != "auto":
            self.details.add(detail == "high")
        return self._media.image(url, fields.path("image_url"))


class Output:
    """Items of one answer as they come, and the events that tell of them.

    Attributes:
      items: As the API has them; those that are done, and the one that is written.
    """

    def __init__(self, written: Written):
        self.items: list[dict] = []
        self._written, self._open = written, False

    def push(self, deltas: Iterable[TextDelta | CallDelta]) -> Iterator[dict]:
        """Events of what was added."""
        for delta in deltas:
            if isinstance(delta, TextDelta):
                yield from self._text(delta.text)
            else:
                yield from self._call(delta)

    def close(self, whole: bool) -> Iterator[dict]:
        """Events of the end; an answer without anything is an empty message."""
        if not self.items:
            yield from self._text("")
        yield from self._done("completed" if whole else "incomplete")

    def _text(self, text: str) -> Iterator[dict]:
        if not self._open or self.items[-1]["type"] != "message":
            yield from self._done()
            item = {"type": "message", "role": "assistant", "content": []}
            yield from self._begin("msg", item)
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.items[-1]["content"].append(part)
            yield self._event("content_part.added", content_index=0, part=dict(part))
        if text:
            self.items[-1]["content"][0]["text"] += text
            yield self._event("output_text.delta", content_index=0, delta=text, logprobs=[])

    def _call(self, delta: CallDelta) -> Iterator[dict]:
        if delta.name:
            yield from self._done()
            call_id = self._written.calls[delta.index].id
            item = {"type": "function_call", "call_id": call_id, "name": delta.name}
            yield from self._begin("fc", {**item, "arguments": ""})
        if delta.arguments:
            self.items[-1]["arguments"] += delta.arguments
            yield self._event("function_call_arguments.delta", delta=delta.arguments)
        if delta.done:
            yield from self._done()

    def _begin(self, kind: str, item: dict) -> Iterator[dict]:
        item = {"id": f"{kind}_{secrets.token_hex(12)}", "status": "in_progress", **item}
        self.items.append(item)
        self._open = True
        yield self._event("output_item.added", item=_copy(item))

    def _done(self, status: str = "completed") -> Iterator[dict]:
        if not self._open:
            return
        self._open, item = False, self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            told = dict(content_index=0, text=part["text"], logprobs=[])
            yield self._event("output_text.done", **told)
            yield self._event("content_part.done", content_index=0, part=dict(part))
        else:
            told = dict(name=item["name"], arguments=item["arguments"])
            yield self._event("function_call_arguments.done", **told)
        yield self._event("output_item.done", item=_copy(item))

    def _event(self, kind: str, **fields: object) -> dict:
        head = {"type": f"response.{kind}", "output_index": len(self.items) - 1}
        if "item" not in fields:
            head["item_id"] = self.items[-1]["id"]
        return {**head, **fields}


def _copy(item: dict) -> dict:
    """As it is now: events are sent later."""
    if item["type"] != "message":
        return dict(item)
    return {**item, "content": [dict(part) for part in item["content"]]}
