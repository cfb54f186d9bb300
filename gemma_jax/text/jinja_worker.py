"""Runs one chat template: a program that came with a checkpoint, and that nobody has read.

Started as a process of its own, which reads a task from stdin and writes an answer to stdout, both
JSON. The environment is that of transformers 5.24 (`utils/chat_template_utils.py`,
`_cached_compile_jinja_template`); jinja2's sandbox keeps a template from everything but its
messages, the limits below from everything but its time and memory.
"""

import json
import sys
from datetime import datetime

MAX_MEMORY = 1 << 30  # bytes, the interpreter included
MAX_OUTPUT = 1 << 24  # characters


def main() -> None:
    task = json.load(sys.stdin)
    _limit(task["seconds"])
    try:
        answer = {"text": _render(task["template"], task["variables"])}
    except Refusal as error:
        answer = {"error": f"refuses the messages: {error}"}
    except (MemoryError, RecursionError):
        answer = {"error": "takes too much memory"}
    except Exception as error:  # whatever a template does wrong
        answer = {"error": f"cannot be rendered: {type(error).__name__}: {error}"[:500]}
    json.dump(answer, sys.stdout)


class Refusal(Exception):
    """What a template says by `raise_exception`."""


def _limit(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits; the time is watched from outside
        return
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))


def _render(template: str, variables: dict) -> str:
    parts, size = [], 0
    for part in _environment().from_string(template).generate(**variables):
        parts.append(part)
        size += len(part)
        if size > MAX_OUTPUT:
            raise ValueError(f"more than {MAX_OUTPUT} characters")
    return "".join(parts)


def _environment():
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what an assistant says, for training; it writes nothing."""

        tags = frozenset({"generation"})

        def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str):
        raise Refusal(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(layout: str) -> str:
        return datetime.now().strftime(layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


if __name__ == "__main__":
    main()
