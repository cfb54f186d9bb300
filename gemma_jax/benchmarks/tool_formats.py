"""Round trip of the calls of BFCL ("simple" and "parallel" prompts) through the three formats.

    python -m gemma_jax.benchmarks.tool_formats --output tool_formats.json

Every prompt's answer, with the first of the allowed values of each argument and again with the
last, is written in each format and read back, whole and in pieces of three characters. No model is
asked: this says nothing of how well one calls tools. The data come from the package `bfcl-eval`
(Apache-2.0), which must be installed, and which is not imported.
"""

import argparse
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

from gemma_jax.text.tool_calls import Answer, ToolCall, collect
from gemma_jax.text.tool_formats import FORMATS, ToolFormat
from gemma_jax.text.tools import Tool

PROMPTS = ("simple_python", "parallel")


def read(name: str) -> Iterator[tuple[list[Tool], list[list[ToolCall]]]]:
    """Tools of each prompt, and its answers."""
    files = importlib.metadata.files("bfcl-eval") or []
    paths = {path.name: path.locate() for path in files if "possible_answer" not in str(path)}
    answers = next(
        path.locate()
        for path in files
        if str(path).endswith(f"possible_answer/BFCL_v4_{name}.json")
    )
    told = {each["id"]: each["ground_truth"] for each in _lines(Path(answers))}
    for each in _lines(Path(paths[f"BFCL_v4_{name}.json"])):
        tools = [
            Tool(t["name"], t["description"], _schema(t["parameters"])) for t in each["function"]
        ]
        yield tools, [[_call(call, i) for call in told[each["id"]]] for i in (0, -1)]


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


# What BFCL's declarations call types that JSON schema names otherwise.
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}


def _schema(said: dict) -> dict:
    """BFCL's declaration as a JSON schema: "any" is no limit, `required` says what is optional."""
    schema = {key: value for key, value in said.items() if key != "optional"}
    kind = schema.pop("type", "any")
    if kind != "any":
        schema["type"] = _TYPES.get(kind, kind)
    if "properties" in schema:
        schema["properties"] = {k: _schema(v) for k, v in schema["properties"].items()}
    if "items" in schema:
        schema["items"] = _schema(schema["items"])
    return schema


def _call(call: dict, which: int) -> ToolCall:
    ((name, arguments),) = call.items()
    # "" among the values means that the argument may be missing
    chosen = {key: [v for v in values if v != ""] for key, values in arguments.items()}
    return ToolCall(name, {key: values[which] for key, values in chosen.items() if values})


def holds(format: ToolFormat, tools: list[Tool], calls: list[ToolCall]) -> bool:
    """Whether calls come back as they were, whole and in pieces."""
    text, parser = format.write_calls(calls), format.parser(tools)
    pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    want = [(call.name, dict(call.arguments)) for call in calls]
    found: list[Answer] = [
        format.parse(text, tools),
        format.parse(f"I look it up.\n{text}"),
        collect([*deltas, *parser.close()]),
    ]
    return all(
        [(call.name, dict(call.arguments)) for call in answer.calls] == want and not answer.errors
        for answer in found
    )


def measure() -> dict:
    """Answers that come back, of all, per set of prompts and format; and declarations refused."""
    results: dict = {"bfcl-eval": importlib.metadata.version("bfcl-eval")}
    for name in PROMPTS:
        prompts = list(read(name))
        results[name] = {"prompts": len(prompts), "answers": sum(len(a) for _, a in prompts)}
        for format in FORMATS.values():
            kept = [holds(format, tools, calls) for tools, answers in prompts for calls in answers]
            results[name][format.name] = sum(kept)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path)
    output, text = parser.parse_args().output, json.dumps(measure(), indent=2)
    print(text)
    if output:
        output.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
