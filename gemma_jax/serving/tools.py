"""Tools of requests, and calls in answers, whatever the route."""

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gemma_jax.multimodal.prompts import Prompt, PromptReader
from gemma_jax.serving.errors import refused
from gemma_jax.serving.fields import Fields
from gemma_jax.serving.limits import Limits
from gemma_jax.serving.structured import Structure
from gemma_jax.serving.text_track import Part, Token
from gemma_jax.text import Tokenizer
from gemma_jax.text.tool_calls import CallDelta, CallParser, Delta, TextDelta
from gemma_jax.text.tool_choice import (
    Choice,
    call_grammar,
    call_or_answer_grammar,
    chosen_tools,
    triggered_grammar,
)
from gemma_jax.text.tool_formats import FUNCTIONGEMMA, JSON, ToolFormat, marker_ids
from gemma_jax.text.tool_messages import render_functiongemma, with_tools
from gemma_jax.text.tools import Tool, as_tools


@dataclass(frozen=True)
class ToolUse:
    """Says which tools an answer may call, and how.

    Attributes:
      format: In which declarations, calls and results are written for the model.
      choice: "none", "auto", "required" or the tool that must be called, as the API names it.
      parallel: Whether there may be several calls.
      strict: Names of those whose arguments fit the schema in any case.
    """

    format: ToolFormat
    tools: tuple[Tool, ...] = ()
    choice: Choice = "auto"
    parallel: bool = True
    strict: frozenset[str] = frozenset()

    @property
    def declared(self) -> tuple[Tool, ...]:
        """Those that the model is told of."""
        return () if self.choice == "none" else self.tools

    @property
    def shown(self) -> tuple[str, ...]:
        """Special tokens that belong to the text of an answer."""
        return self.format.markers if self.declared else ()

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """What ends an answer beside what always does."""
        return tuple(marker_ids(tokenizer, self.format.stops if self.declared else ()).values())

    def written(self) -> "Written":
        """An answer that has not begun."""
        parser = self.format.parser(self.tools) if self.declared else None
        return Written(parser, self.parallel)

    def structure(self, answer: Structure | None, free: bool) -> Structure | None:
        """The grammar of an answer.

        Args:
          answer: That of one which calls no tool.
          free: Whether text beside calls of strict tools may follow a grammar that leaves it free.

        Raises:
          ApiError: A schema that no grammar of this format holds; a grammar of the answer that is
            no schema, beside tools.
        """
        if self.declared and answer is not None and answer.kind != "schema":
            message = f"{answer.param} and tools cannot both be followed; give tool_choice 'none'"
            raise refused(f"{message} or leave one out", answer.param, "unsupported_value")
        try:
            grammar = self._grammar(answer, free)
        except ValueError as error:
            raise refused(f"tools: {error}", "tools", "unsupported_value") from None
        if grammar is None:
            return answer
        return Structure("lark", grammar, "tool_choice" if answer is None else answer.param)

    def _grammar(self, answer: Structure | None, free: bool) -> str | None:
        if self.declared and answer is not None and self.choice == "auto":
            schema = json.loads(answer.text)
            return call_or_answer_grammar(self.tools, schema, self.format, parallel=self.parallel)
        if self.choice != "auto":
            return call_grammar(self.tools, self.choice, self.format, parallel=self.parallel)
        if not (free and self.strict):
            return None
        # What FunctionGemma's marker begins is a call, of whichever tool.
        by_marker = bool(self.format.markers)
        held = [tool for tool in self.tools if by_marker or tool.name in self.strict]
        return triggered_grammar(held, self.format)


def tool_format_of(tokenizer: Tokenizer) -> ToolFormat:
    """FunctionGemma's where there are its special tokens, else JSON, as Google's guide has it."""
    own = marker_ids(tokenizer, FUNCTIONGEMMA.markers)
    return FUNCTIONGEMMA if len(own) == len(FUNCTIONGEMMA.markers) else JSON


def read_tools(fields: Fields, tokenizer: Tokenizer, limits: Limits) -> ToolUse:
    """The fields `tools`, `tool_choice` and `parallel_tool_calls`.

    Raises:
      ApiError: A tool that cannot be declared, too many or too large ones, another choice.
    """
    items = fields.items("tools", most=limits.tools) or []
    size = len(json.dumps(items).encode())
    if size > limits.tools_bytes:
        raise fields.error(f"{size:,} bytes are more than {limits.tools_bytes:,}", "tools")
    tools = tuple(_tool(fields, i, item) for i, item in enumerate(items))
    try:
        as_tools(tools)
    except ValueError as error:
        raise fields.error(str(error), "tools") from None
    choice = fields.raw("tool_choice")
    choice = "auto" if choice is None else choice
    parallel = fields.boolean("parallel_tool_calls", True)
    try:
        chosen_tools(tools, choice)
    except ValueError as error:
        raise fields.error(str(error), "tool_choice") from None
    strict = frozenset(t.name for t, item in zip(tools, items, strict=True) if _is_strict(item))
    return ToolUse(tool_format_of(tokenizer), tools, choice, parallel, strict)


def _is_strict(item: dict) -> bool:
    return item.get("function", item).get("strict") is True


def _tool(fields: Fields, index: int, item: object) -> Tool:
    try:
        return Tool.from_json(item)
    except (ValueError, RecursionError) as error:
        line = str(error) if isinstance(error, ValueError) else "nested too deep"
        raise fields.error(line, f"tools[{index}]") from None


def chat_prompt(reader: PromptReader, messages: Sequence[dict], use: ToolUse) -> Prompt:
    """The prompt of a conversation in which tools may be declared, called, and answer.

    Raises:
      ValueError: Messages out of turn, and declarations that the format cannot say.
    """
    tooled = any(message["role"] == "tool" or message.get("tool_calls") for message in messages)
    if not use.declared and not tooled:
        return reader.chat(messages)
    if use.format.role == "user":
        return reader.chat(with_tools(messages, use.declared, use.format))
    text = render_functiongemma(messages, use.declared, use.format)
    return reader.text(text, reader.media_of(messages), bos=False)


@dataclass
class Call:
    """One call of an answer so far.

    Attributes:
      id: By which its result refers to it.
      arguments: JSON text, whole when `done`.
    """

    name: str
    arguments: str = ""
    done: bool = False
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class Written:
    """One answer so far, taken apart into text and calls.

    Args:
      parser: Finds the calls; `None`: all is text.
      parallel: Whether a second call counts.

    Attributes:
      text: All that is no call.
      tokens: Of both.
      finish_reason: As the API names it, "tool_calls" included; `None` until the end.
    """

    def __init__(self, parser: CallParser | None = None, parallel: bool = True):
        self._parser, self._parallel = parser, parallel
        self.text, self.calls = "", list[Call]()
        self.tokens, self.finish_reason = list[Token](), None

    @property
    def ended(self) -> bool:
        """Whether nothing that may follow counts."""
        return not self._parallel and any(call.done for call in self.calls)

    def push(self, part: Part) -> list[TextDelta | CallDelta]:
        """What a further part adds."""
        if self.finish_reason is not None:
            return []
        deltas = list(self._counted(self._deltas(part)))
        self.tokens += part.tokens
        reason = "stop" if self.ended else part.finish_reason
        called = reason == "stop" and self.calls
        self.finish_reason = "tool_calls" if called else reason
        return deltas

    def _deltas(self, part: Part) -> list[Delta]:
        if self._parser is None:
            return [TextDelta(part.text)] if part.text else []
        deltas = self._parser.feed(part.text)
        return deltas if part.finish_reason is None else [*deltas, *self._parser.close()]

    def _counted(self, deltas: Iterable[Delta]) -> Iterable[TextDelta | CallDelta]:
        """Without what follows the only call; what is wrong with one, its arguments show."""
        for delta in deltas:
            if self.ended:
                return
            if isinstance(delta, TextDelta):
                self.text += delta.text
            elif not isinstance(delta, CallDelta):
                continue
            elif delta.name:
                self.calls.append(Call(delta.name, delta.arguments, delta.done))
            else:
                self.calls[delta.index].arguments += delta.arguments
                self.calls[delta.index].done |= delta.done
            yield delta


def read_calls(fields: Fields, limits: Limits) -> list[dict]:
    """The calls of an assistant message.

    Raises:
      ApiError: They are not of the API's form.
    """
    items = fields.items("tool_calls", most=limits.tools) or []
    return [_call(Fields(item, f"{fields.where}.tool_calls[{i}]")) for i, item in enumerate(items)]


def _call(fields: Fields) -> dict:
    call_id = required(fields, "id")
    fields.text("type", choices=("function",))
    inner = fields.object("function")
    if inner is None:
        raise fields.error("is missing", "function")
    name, arguments = required(inner, "name"), inner.text("arguments", "")
    inner.raw("parsed_arguments")  # the openai client's own word for the same arguments
    inner.close()
    fields.integer("index", low=0, high=1 << 31)  # of streams; calls are in their order
    fields.close()
    return call_of(call_id, name, arguments, inner)


def call_of(call_id: str, name: str, arguments: str, fields: Fields) -> dict:
    """A call as messages hold it.

    Raises:
      ApiError: Arguments that are no object of JSON.
    """
    try:
        read = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise fields.error("expected an object of JSON", "arguments")
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def required(fields: Fields, name: str) -> str:
    """A text that must be there."""
    value = fields.text(name)
    if not value:
        raise fields.error("is missing", name)
    return value


def answered_call(fields: Fields, name: str, known: Iterable[str]) -> str:
    """The id in a result of the call that it answers.

    Raises:
      ApiError: No such call came before it.
    """
    call_id = required(fields, name)
    if call_id not in known:
        raise fields.error(f"{call_id!r:.80} is no call of a message before this one", name)
    return call_id
