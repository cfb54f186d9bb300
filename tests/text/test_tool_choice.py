"""What a model must write where it must call a tool: llguidance holds texts to the grammars."""

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_jax.text.tool_arguments import check_arguments
from gemma_jax.text.tool_calls import ToolCall
from gemma_jax.text.tool_choice import call_grammar
from gemma_jax.text.tool_formats import FORMATS, FUNCTIONGEMMA, JSON, PYTHON
from gemma_jax.text.tools import Tool

llguidance = pytest.importorskip("llguidance")
by_format = pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))


class Pieces:
    """Bytes, and FunctionGemma's marks as special tokens."""

    eos_token_id, bos_token_id = 256, None
    special = ("<eos>", *FUNCTIONGEMMA.markers)

    def __init__(self):
        marks = [b"\xff" + mark.encode() for mark in self.special]
        self.special_token_ids = [*range(256, 256 + len(marks))]
        self.tokens = [*(bytes([i]) for i in range(256)), *marks]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def ids_of(text: str) -> Iterator[int]:
    while text:
        mark = next((m for m in FUNCTIONGEMMA.markers if text.startswith(m)), None)
        yield from text[0].encode() if mark is None else [256 + Pieces.special.index(mark)]
        text = text[len(mark or text[0]) :]


@pytest.fixture(scope="module")
def vocabulary():
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Pieces()))


def matcher_of(vocabulary, grammar):
    made = llguidance.LLMatcher.grammar_from_lark(grammar)
    matcher = llguidance.LLMatcher(vocabulary, made, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def is_accepted(matcher, text):
    matcher.reset()
    ids = list(ids_of(text))
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


PLACE = {"type": "object", "required": ["city"], "additionalProperties": False, "properties": {
    "city": {"type": "string", "description": "Where"}, "zip": {"type": "integer"}}}  # fmt: skip
BOOK = Tool("book.a-room", "", {
    "type": "object", "required": ["guests"], "properties": {
        "at": PLACE, "breakfast": {"type": "boolean"}, "guests": {"type": "integer"},
        "notes": {"type": "array", "items": {"type": "string"}},
        "price": {"type": "number", "nullable": True}, "unit": {"enum": ["é", "<", 3, None]},
    }})  # fmt: skip
PING = Tool("ping")
SAY = Tool("say", "", {"properties": {"what": {}, "x": {"type": "string", "nullable": True}}})
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=8)
ARGUMENTS = st.fixed_dictionaries({}, optional={
    "at": st.builds(lambda city, rest: {"city": city, **rest}, TEXTS,
                    st.fixed_dictionaries({}, optional={"zip": st.integers()})),
    "breakfast": st.booleans(),
    "guests": st.integers(-(2**60), 2**60),
    "notes": st.lists(TEXTS, max_size=3),
    "price": st.none() | st.floats(-1e15, 1e15).filter(lambda x: x == 0 or abs(x) > 1e-4),
    "unit": st.sampled_from(["é", "<", 3, None]),
})  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b c", "é"]), inner, max_size=2)
    ),
    max_leaves=4,
)
ORDER = list(BOOK.parameters["properties"])


def booking(arguments):
    given = {"guests": 1, **arguments}
    return ToolCall(BOOK.name, {key: given[key] for key in ORDER if key in given})


CALLS = st.lists(
    ARGUMENTS.map(booking)
    | st.just(ToolCall("ping"))
    | VALUES.map(lambda value: ToolCall("say", {"what": value})),
    min_size=1,
    max_size=3,
)


@by_format
def test_calls_as_they_are_written_are_accepted(format, vocabulary):
    matcher = matcher_of(vocabulary, call_grammar([BOOK, PING, SAY], "required", format))

    @given(CALLS)
    @settings(max_examples=60, deadline=None)
    def check(calls):
        text = format.write_calls(calls)
        assert is_accepted(matcher, text)
        assert [(c.name, c.arguments) for c in format.parse(text).calls] == [
            (c.name, c.arguments) for c in calls
        ]

    check()


@by_format
def test_what_the_grammar_leads_to_is_a_right_call(format, vocabulary):
    """Chosen blindly among the legal tokens, a text is read back and its arguments are right."""
    tools = [BOOK, PING, SAY]
    matcher = matcher_of(vocabulary, call_grammar(tools, "required", format))

    @given(st.randoms(use_true_random=False))
    @settings(max_examples=25, deadline=None)
    def check(random):
        matcher.reset()
        text, found = b"", 0
        while not matcher.is_stopped() and found < 300:
            mask = matcher.compute_bitmask()
            legal = [i for i in range(262) if mask[i // 8] >> i % 8 & 1 and not 127 <= i < 256]
            closing = [i for i in legal if i == 256 or i > 256 or chr(i) in '"]})']
            i = random.choice(closing if closing and found > 20 else legal)
            found += 1
            assert matcher.consume_token(i)
            text += Pieces().tokens[i].lstrip(b"\xff") if i != 256 else b""
        if not matcher.is_stopped():
            return
        answer = format.parse(text.decode(), tools)
        if answer.errors and ("of floats" in answer.errors[0] or "twice" in answer.errors[0]):
            return  # which no grammar holds
        assert answer.calls and not answer.errors and answer.text == ""
        for call in answer.calls:
            check_arguments(next(t for t in tools if t.name == call.name), call.arguments)

    check()


@by_format
def test_wrong_calls_are_not(format, vocabulary):
    matcher = matcher_of(vocabulary, call_grammar([BOOK, PING], "required", format))
    right = booking({"at": {"city": "Rome"}, "unit": 3})
    assert is_accepted(matcher, format.write_calls([right]))
    for arguments in [
        {},
        {"at": {"city": "Rome"}},
        {"guests": "1"},
        {"guests": 1.5},
        {"guests": None},
        {"guests": 1, "price": "x"},
        {"guests": 1, "unit": "e"},
        {"guests": 1, "zoo": 1},
        {"at": {"zip": 1}, "guests": 1},
        {"at": {"city": "Rome", "zoo": 1}, "guests": 1},
        {"guests": 1, "notes": ["a", 1]},
    ]:
        assert not is_accepted(matcher, format.write_calls([ToolCall(BOOK.name, arguments)]))
    for call in [ToolCall("pong"), ToolCall("ping", {"a": 1}), ToolCall("pin")]:
        assert not is_accepted(matcher, format.write_calls([call]))
    text = format.write_calls([ToolCall("ping")])
    for wrong in ["", "Well. " + text, text + " ", text[:-1], "Hello"]:
        assert not is_accepted(matcher, wrong)


@by_format
def test_a_named_tool_and_one_call(format, vocabulary):
    named = {"type": "function", "function": {"name": "ping"}}
    ping, book = ToolCall("ping"), booking({})
    matcher = matcher_of(vocabulary, call_grammar([BOOK, PING], named, format, parallel=False))
    assert is_accepted(matcher, format.write_calls([ping]))
    assert not is_accepted(matcher, format.write_calls([book]))
    assert not is_accepted(matcher, format.write_calls([ping, ping]))
    short = {"type": "function", "name": "ping"}
    assert call_grammar([PING], short, format) == call_grammar([PING], "required", format)
    for free in ("none", "auto"):
        assert call_grammar([PING], free, format) is None


def limits_tool(schema):
    tree = {"type": "object", "required": ["v"], "additionalProperties": False,
            "properties": {"v": {"type": "integer", "minimum": 3},
                           "next": {"$ref": "#/$defs/tree"}}}  # fmt: skip
    return Tool("f", "", {"properties": {"a": schema}, "$defs": {"tree": tree}})


LIMITS = [
    ({"$ref": "#/$defs/tree"}, {"v": 3, "next": {"v": 4}}, {"v": 3, "next": {"v": 2}}),
    ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}, [1, 2], [1]),
    ({"type": "array", "items": {"type": "integer"}, "maxItems": 2}, [], [1, 2, 3]),
    ({"type": "array", "maxItems": 0}, [], [1]),
    ({"type": "string", "pattern": "^[a-c]+$"}, "abc", "abd"),
    ({"type": "string", "minLength": 2, "maxLength": 3}, "é\n", "abcd"),
    ({"type": "string", "format": "date"}, "2024-02-29", "2024-2-29"),
    ({"type": "integer", "exclusiveMinimum": 3, "nullable": True}, None, 3),
    ({"anyOf": [{"type": "string"}, {"const": [1, {"a b": True}]}]}, [1, {"a b": True}], [1]),
    ({"allOf": [{"enum": ["x", 1]}], "title": "T"}, 1, True),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, {"a b": 1}, {"a": "1"}),
    ({"properties": {"k k": {"type": "null"}}, "additionalProperties": False}, {"k k": None},
     {"k k": 1}),
]  # fmt: skip


@pytest.mark.parametrize("format", [JSON, PYTHON], ids=["json", "python"])
@pytest.mark.parametrize(("schema", "right", "wrong"), LIMITS, ids=lambda x: str(x)[:40])
def test_limits_hold(format, schema, right, wrong, vocabulary):
    tool = limits_tool(schema)
    matcher = matcher_of(vocabulary, call_grammar([tool], "required", format))
    check_arguments(tool, {"a": right})
    assert is_accepted(matcher, format.write_calls([ToolCall("f", {"a": right})]))
    assert not is_accepted(matcher, format.write_calls([ToolCall("f", {"a": wrong})]))


def test_names_that_python_cannot_say(vocabulary):
    tool = Tool("f", "", {"properties": {"a b": {"type": "boolean"}, "c": {"type": "null"}}})
    matcher = matcher_of(vocabulary, call_grammar([tool], "required", PYTHON))
    text = PYTHON.write_calls([ToolCall("f", {"a b": True, "c": None})])
    assert is_accepted(matcher, text) and text == '[f(**{"a b": True}, c=None)]'


UNIQUE = {"type": "array", "uniqueItems": True}
OPEN = {"type": "object", "properties": {}, "additionalProperties": True}


@pytest.mark.parametrize(
    ("tools", "choice", "format", "line"),
    [
        ([PING], {"type": "function", "function": {"name": "pong"}}, JSON, "did you mean 'ping'"),
        ([], {"type": "function", "name": "pong"}, JSON, "there are no tools"),
        ([], "required", JSON, "there are no tools"),
        ([PING], "any", JSON, "expected tool_choice to be 'none', 'auto', 'required' or"),
        ([PING], {"type": "function", "function": {"name": "ping", "x": 1}}, JSON, "tool_choice"),
        ([PING], {"type": "allowed_tools", "name": "ping"}, JSON, "expected tool_choice"),
        ([limits_tool(UNIQUE)], "required", JSON, "can hold 'uniqueItems'"),
        ([limits_tool(UNIQUE)], "required", PYTHON, "cannot hold 'uniqueItems' of f.a"),
        ([limits_tool({"oneOf": [{}]})], "required", PYTHON, "cannot hold 'oneOf' of f.a"),
        ([limits_tool({"minimum": 3})], "required", PYTHON, "a 'type' beside 'minimum' of f.a"),
        ([limits_tool({"type": "string", "minLength": 1})], "required", FUNCTIONGEMMA,
         "cannot say"),
        ([Tool("f", "", OPEN)], "required", PYTHON, "cannot hold 'additionalProperties' of f"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(tools, choice, format, line):
    with pytest.raises(ValueError, match=line):
        call_grammar(tools, choice, format)
