"""A model that calls tools: their results go back to it until it answers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gemma_jax.decoder.model import Gemma
from gemma_jax.inference.generate import generate
from gemma_jax.text import Tokenizer, chat_stop_ids, in_gemma_format
from gemma_jax.text.tool_arguments import call_with
from gemma_jax.text.tool_calls import Answer, ToolCall
from gemma_jax.text.tool_choice import Choice, call_grammar
from gemma_jax.text.tool_formats import marker_ids, tool_format
from gemma_jax.text.tool_messages import render_functiongemma, result_of, with_tools
from gemma_jax.text.tools import Tool, as_tools

Message = Mapping[str, object]
Event = Callable[[str, object], None]


@dataclass(frozen=True)
class ToolRun:
    """Holds a conversation in which tools were called.

    Attributes:
      messages: All of it, in the form of OpenAI's API.
      text: The last answer.
      finished: Whether that answer calls no more tools; if not, the rounds ran out.
    """

    messages: list[Message]
    text: str
    finished: bool


class Tools:
    """Lets a model call Python functions, and gives it what they return.

    What goes wrong in a call (no such tool, arguments of the wrong type, an exception, a call that
    cannot be read) is told to the model as the result.

    Args:
      tools: Functions with type hints, `Tool`s, or JSON declarations.
      format: "json", "python" or "functiongemma", see `gemma_jax.text.tool_formats`.
      choice: Of the first answer: "auto", "none" (tools are not declared), "required" or one tool
        as OpenAI's API names it. A call that must come follows a grammar (the extra `grammar`).
      on_event: Called with "answer" and an `Answer`, "call" and a `ToolCall`, "result" and a
        message, as they come.

    Raises:
      ValueError: A tool that cannot be declared or chosen; no such format.

    Examples:
      >>> import gemma_jax as gj
      >>> def area(width: float, height: float) -> float:
      ...     '''The area of a rectangle.'''
      ...     return width * height
      >>> tools = gj.Tools([area], format="python")
      >>> answers = iter(["[area(width=2, height=3), area(width='a')]", "It is 6."])
      >>> run = tools.loop(lambda messages: next(answers), "How large is 2 by 3?")
      >>> run.text, run.finished
      ('It is 6.', True)
      >>> for message in run.messages[2:4]: print(message["content"])
      6
      {"error": "expected ['height'] in the arguments of area"}
    """

    def __init__(
        self,
        tools: Sequence[Tool | Callable | Mapping[str, object]],
        *,
        format: str = "json",
        choice: Choice = "auto",
        on_event: Event | None = None,
    ):
        self.tools, self.format = as_tools(tools), tool_format(format)
        self._grammar = call_grammar(self.tools, choice, self.format)
        self._declared = () if choice == "none" else self.tools
        self._tell = on_event or (lambda kind, value: None)

    def run(
        self,
        model: Gemma,
        tokenizer: Tokenizer,
        question: str | Sequence[Message],
        *,
        max_rounds: int = 4,
        **options: object,
    ) -> ToolRun:
        """Asks the model, calls what it calls, and goes on until it answers.

        Args:
          model, tokenizer: From `gemma_jax.load`.
          question: A text, or the messages of a conversation.
          max_rounds: How often the model is asked, at most.
          options: Those of `gemma_jax.generate`, such as `max_new_tokens`.

        Raises:
          ValueError: The tokenizer lacks what the format needs; see `generate`.
        """
        self._check(tokenizer)
        by_markers = bool(self.format.markers)
        stops = marker_ids(tokenizer, self.format.stops).values()
        options.setdefault("stop_ids", (*chat_stop_ids(tokenizer), *stops))
        grammars = [self._grammar]  # for the first answer

        def answer(messages: Sequence[Message]) -> str:
            if by_markers:
                text = render_functiongemma(messages, self._declared, self.format)
                prompt = tokenizer.encode(text)
            else:
                prompt = with_tools(messages, self._declared, self.format)
            grammar = grammars.pop() if grammars else None
            held = {} if grammar is None else {"lark": grammar}
            done = generate(model, tokenizer, prompt, **held, **options)
            return self._shown(tokenizer, done.token_ids) if by_markers else done.text

        return self.loop(answer, question, max_rounds=max_rounds)

    def loop(
        self,
        answer: Callable[[Sequence[Message]], str],
        question: str | Sequence[Message],
        *,
        max_rounds: int = 4,
    ) -> ToolRun:
        """The same with any function that answers messages, such as a client of a server.

        Raises:
          ValueError: `max_rounds` below 1.
        """
        if max_rounds < 1:
            raise ValueError(f"expected at least one round, got {max_rounds=}")
        is_text = isinstance(question, str)
        messages = [{"role": "user", "content": question}] if is_text else list(question)
        for round_number in range(max_rounds):
            found = self._parsed(answer(messages))
            self._tell("answer", found)
            calls = [
                ToolCall(call.name, call.arguments, f"call_{round_number}_{i}")
                for i, call in enumerate(found.calls)
            ]
            messages.append(_message(found, calls))
            messages += map(self._result, calls)
            if found.errors:
                line = f"a call could not be read: {found.errors[0]}"
                messages.append({"role": "user", "content": line})
            elif not calls:
                return ToolRun(messages, found.text, True)
        return ToolRun(messages, found.text, False)

    def _parsed(self, text: str) -> Answer:
        return self.format.parse(text, self.tools) if self._declared else Answer(text, ())

    def _result(self, call: ToolCall) -> Message:
        self._tell("call", call)
        try:
            tool = next((tool for tool in self.tools if tool.name == call.name), None)
            if tool is None:
                names = [tool.name for tool in self.tools]
                raise ValueError(f"there is no tool {call.name!r}, only {names}")
            value = call_with(tool, call.arguments)
            content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            said = {"name": call.name, "content": content}
            self.format.write_results([result_of(said, {})])  # can it be said?
        except Exception as error:  # whatever a tool does wrong
            line = " ".join(str(error).split()) or type(error).__name__
            content = json.dumps({"error": line[:500]}, ensure_ascii=False)
            content = content.replace("<", "(").replace(">", ")")
        message = {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": content}
        self._tell("result", message)
        return message

    def _check(self, tokenizer: Tokenizer) -> None:
        known = marker_ids(tokenizer, self.format.markers)
        missing = [mark for mark in self.format.markers if mark not in known]
        if missing:
            raise ValueError(
                f"the format {self.format.name} needs the special tokens {missing}, which this "
                "tokenizer lacks; use the format json or python"
            )
        if self.format.markers and not in_gemma_format(tokenizer):
            raise ValueError(
                f"the format {self.format.name} is written without the checkpoint's own chat "
                "template; use the format json or python"
            )

    def _shown(self, tokenizer: Tokenizer, ids: Sequence[int]) -> str:
        """The text with the format's markers, and without all other special tokens."""
        marks = set(marker_ids(tokenizer, self.format.markers).values())
        stops = set(marker_ids(tokenizer, self.format.stops).values())
        hidden = (set(tokenizer.special_ids.values()) - marks) | stops
        return tokenizer.decode([i for i in ids if i not in hidden])


def _message(found: Answer, calls: Sequence[ToolCall]) -> Message:
    """The answer as OpenAI's API has it."""
    message: dict[str, object] = {"role": "assistant", "content": found.text}
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": json.dumps(dict(call.arguments), ensure_ascii=False),
                },
            }
            for call in calls
        ]
    return message
