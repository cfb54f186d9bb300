"""`gemma-jax generate` under a grammar."""

import json

import pytest

SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
SCHEMA["additionalProperties"] = False


def test_schema_as_text_and_as_a_file(cli, talker, tmp_path):
    ran = cli("generate", "The", "--model", talker, "--schema", json.dumps(SCHEMA))
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["a"] in (1, 2)
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    words = ("--schema", tmp_path / "schema.json", "--json")
    told = json.loads(cli("generate", "The", "--model", talker, *words).out)
    assert told["text"] + "\n" == ran.out and told["finish_reason"] == "stop"


def test_regex_and_lark(cli, talker, tmp_path):
    ran = cli("generate", "The", "--model", talker, "--regex", "(cat|dog)s")
    assert ran.out in ("cats\n", "dogs\n")
    (tmp_path / "grammar.lark").write_text('start: ("cat" | "dog") "s"')
    assert cli("generate", "The", "--model", talker, "--lark", tmp_path / "grammar.lark").out == (
        ran.out
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--schema", '{"not": {}}'), "not"),
        (("--schema", "{"), "--schema is no JSON"),
        (("--schema", "no/such/file.json"), "no/such/file.json"),
        (("--regex", "(a"), "unclosed group"),
        (("--regex", ""), "--regex must be a text"),
        (("--regex", "a", "--schema", "{}"), "--schema or --regex, not both"),
        (("--regex", "a", "--speculative", "x"), "--regex and --speculative"),
    ],
)
def test_mistakes_are_one_line(refused, talker, words, said):
    assert said in refused("generate", "The", "--model", talker, *words)
