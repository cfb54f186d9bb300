"""Masks of grammars: what is legal, what never is, what is refused and how soon."""

import json
import sys
import time

import numpy as np
import pytest

from gemma_jax.inference.constraints import GrammarCompiler, GrammarLimits
from gemma_jax.inference.grammar import Grammar
from gemma_jax.loading import load_tokenizer

V = 400  # more than the tokenizer has

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("checkpoints/digits")


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, V)


def legal(mask_W: np.ndarray) -> set[int]:
    bits = np.unpackbits(mask_W.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def ids_where_no_text_is(tokenizer) -> set[int]:
    return set(tokenizer.special_ids.values()) | set(range(tokenizer.vocab_size, V + 31))


def test_a_mask_has_a_bit_for_every_id(compiler):
    mask_W = compiler.constraint("regex", "a").mask()
    assert mask_W.dtype == np.uint32 and mask_W.shape == (-(-V // 32),)


def test_masks_hold_what_may_come_and_no_more(compiler, tokenizer):
    constraint = compiler.constraint("regex", "(yes|no)")
    assert {tokenizer.decode([i]) for i in legal(constraint.mask())} == {"y", "n"}
    constraint.accept(tokenizer.encode("y"))
    assert {tokenizer.decode([i])[0] for i in legal(constraint.mask())} == {"e"}
    assert b"es".startswith(tokenizer.decode_bytes(constraint.forced()))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", r"(.|\n)*"),
        ("schema", '{"type": "string"}'),
        ("lark", "start: /[^a]*/"),
        ("lark", 'start: "a"? <[0-358]>?'),
    ],
)
def test_ids_that_are_no_text_are_never_legal(compiler, tokenizer, kind, text):
    constraint = compiler.constraint(kind, text)
    for _ in range(3):
        found = legal(constraint.mask())
        assert not found & (ids_where_no_text_is(tokenizer) - set(tokenizer.stop_ids))
        if not (words := found - set(tokenizer.stop_ids)):
            break
        constraint.accept([max(words)])


def test_a_text_ends_where_it_is_whole_and_nowhere_else(compiler, tokenizer):
    constraint = compiler.constraint("regex", "ab?")
    assert tokenizer.eos_id not in legal(constraint.mask())
    constraint.accept(tokenizer.encode("a"))
    assert tokenizer.eos_id in legal(constraint.mask()) and not constraint.complete
    constraint.accept(tokenizer.encode("b"))
    assert constraint.complete and legal(constraint.mask()) == {tokenizer.eos_id}
    constraint.accept([tokenizer.eos_id])
    assert not legal(constraint.mask())


def test_rewinding_goes_back_to_the_same_masks(compiler, tokenizer):
    constraint = compiler.constraint("schema", json.dumps(PERSON))
    ids = [*tokenizer.encode('{"name": "Ada", "age": 36}'), tokenizer.eos_id]
    masks = []
    for i in ids:
        masks.append(constraint.mask())
        constraint.accept([i])
    for before in reversed(masks):
        constraint.rewind(1)
        np.testing.assert_array_equal(constraint.mask(), before)
    constraint.accept(ids)


def test_a_token_that_is_not_legal_changes_nothing(compiler, tokenizer):
    constraint = compiler.constraint("regex", "(yes|no)")
    before = constraint.mask()
    with pytest.raises(ValueError, match="not legal"):
        constraint.accept([*tokenizer.encode("n"), tokenizer.bos_id])
    with pytest.raises(ValueError, match="not legal"):
        constraint.accept([tokenizer.eos_id])
    np.testing.assert_array_equal(constraint.mask(), before)


def test_a_copy_goes_its_own_way(compiler, tokenizer):
    constraint = compiler.constraint("regex", "(yes|no)")
    other = constraint.copy()
    constraint.accept(tokenizer.encode("y"))
    other.accept(tokenizer.encode("no"))
    assert other.complete and not constraint.complete


def test_following_what_is_forced_writes_the_skeleton(compiler, tokenizer):
    constraint = compiler.constraint("schema", json.dumps(PERSON))
    forced = constraint.forced()
    assert tokenizer.decode(forced) in '{"name": "' and len(forced) > 1
    for i in forced:  # the masks would have led to the same tokens
        assert legal(constraint.mask()) == {i}
        constraint.accept([i])


HOSTILE = {
    "nested": ("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "powers": ("regex", "((a{1000}){1000}){1000}"),
    "recursive": ("schema", '{"$ref": "#"}'),
    "deep": ("schema", '{"items": ' * 5000 + "{}" + "}" * 5000),
    "products": (
        "schema",
        json.dumps(
            {
                "allOf": [
                    {"anyOf": [{"properties": {f"p{i}": {"const": j}}} for j in range(4)]}
                    for i in range(12)
                ]
            }
        ),
    ),
    "automata": (
        "schema",
        json.dumps({"allOf": [{"pattern": f"(a|b)*a(a|b){{{i}}}"} for i in range(20, 25)]}),
    ),
    "remote": ("schema", '{"$ref": "https://example.com/schema.json"}'),
    "file": ("schema", '{"$ref": "file:///etc/passwd"}'),
    "many": ("schema", json.dumps({"enum": [f"value {i}" for i in range(6000)]})),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_done_with_in_time(compiler, name):
    start = time.monotonic()
    try:
        compiler.constraint(*HOSTILE[name]).mask()
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
    assert time.monotonic() - start < 6


@pytest.mark.parametrize("name", ["nested", "recursive", "deep", "products", "remote", "file"])
def test_hostile_grammars_are_refused(compiler, name):
    with pytest.raises(ValueError):
        compiler.constraint(*HOSTILE[name])


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        ("schema", '{"type": "array", "contains": {}}', "contains"),
        ("schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("schema", '{"x-guidance": {"lenient": true}, "contains": 1}', "contains"),
        ("schema", '{"type": "string", "format": "weird"}', "weird"),
        ("schema", "[]", "JSON object"),
        ("regex", "(a", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("lark", "start: foo", "foo"),
        ("yaml", "a: 1", "schema, regex or lark"),
        ("regex", "a" * 300_000, "bytes"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(compiler, kind, text, why):
    with pytest.raises(ValueError, match=why) as caught:
        compiler.constraint(kind, text)
    assert "\n" not in str(caught.value)


def test_time_to_compile_is_bounded(tokenizer):
    compiler = GrammarCompiler(tokenizer, V, limits=GrammarLimits(compile_seconds=0.01))
    with pytest.raises(ValueError, match=r"more than 0\.01 s"):
        compiler.constraint(*HOSTILE["powers"])


def test_only_special_tokens_end_a_text(tokenizer):
    with pytest.raises(ValueError, match="is text"):
        GrammarCompiler(tokenizer, V, stop_ids=tokenizer.encode("n"))
    with pytest.raises(ValueError, match="no token 400"):
        GrammarCompiler(tokenizer, V, stop_ids=[400])
    with pytest.raises(ValueError, match="needs a stop token"):
        GrammarCompiler(tokenizer, V, stop_ids=[])


def test_what_is_missing_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"gemma-jax\[grammar\]"):
        GrammarCompiler(tokenizer, V)


class Model:
    """Has what a pydantic model has."""

    @staticmethod
    def model_json_schema():
        return PERSON

    @staticmethod
    def model_validate_json(text):
        return ("parsed", text)


class Open(Model):
    """Says nothing of other properties, as pydantic's models do."""

    @staticmethod
    def model_json_schema():
        inner = {"properties": {"properties": {"type": "integer"}}}
        free = {"properties": {}, "additionalProperties": True}
        return {"$defs": {"inner": inner}, "properties": {"a": {"items": inner}, "b": free}}


def test_grammars_are_given_in_one_way():
    assert Grammar.of() is None
    assert Grammar.of(schema=PERSON) == Grammar.of(schema=json.dumps(PERSON))
    assert Grammar.of(schema=Model).parse("{}") == ("parsed", "{}")
    assert Grammar.of(schema=Open).text.count('"additionalProperties": false') == 3
    with pytest.raises(ValueError, match="schema or regex, not both"):
        Grammar.of(schema=PERSON, regex="a")
    for wrong in ("{", "[]", 3, [PERSON], {"enum": {1}}, {"x": "{" * 3, "y": object()}):
        with pytest.raises(ValueError, match="schema"):
            Grammar.of(schema=wrong)
    with pytest.raises(ValueError, match="regex must be a text"):
        Grammar.of(regex="")


def test_gemmas_own_unused_pieces_are_no_text(real_tokenizer):
    texts = real_tokenizer.texts()
    for name in ("<unused0>", "<unused99>", "<unused6241>", "<mask>", "[multimodal]"):
        assert texts[real_tokenizer.id_of(name)] == b""
    assert texts[real_tokenizer.id_of("\n\n")] == b"\n\n"
    assert all(texts[i] == b"" for i in real_tokenizer.special_ids.values())
    compiler = GrammarCompiler(real_tokenizer, 262_144)
    constraint = compiler.constraint("schema", '{"enum": ["<unused1> <mask>"]}')
    written = []
    while not constraint.complete:
        written += [min(legal(constraint.mask()))]
        constraint.accept(written[-1:])
    assert real_tokenizer.decode(written) == '"<unused1> <mask>"'
    assert not any(real_tokenizer.pieces([i])[0] in ("<unused1>", "<mask>") for i in written)
