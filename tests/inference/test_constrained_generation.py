"""Text under a grammar: valid at any temperature, and otherwise the model's."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gemma_jax import forward, generate, stream
from gemma_jax.inference.constrained import ConstrainedSession, read_forced
from gemma_jax.inference.constraints import GrammarCompiler
from gemma_jax.inference.decode import advance
from gemma_jax.inference.sampling import Sampling
from gemma_jax.loading import load_tokenizer

V = 384  # the tokenizer has 359: what is beyond must not be chosen

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["cat", "dog"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "kind", "age", "tags"],
    "additionalProperties": False,
}
PROMPTS = ["Which digit is left?", "Read", "How many digits are there?"]
LIMIT = 120


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("checkpoints/digits")


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.gemma3(2, vocab_size=V), "unrolled")


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, V)


@pytest.fixture(scope="module")
def sampled(model, tokenizer):
    """Thirty-two texts, half of them at temperature 2."""
    count = 32
    return generate(
        model,
        tokenizer,
        [PROMPTS[i % 3] for i in range(count)],
        schema=PERSON,
        sampling=[Sampling(temperature=1.0 + (i % 2)) for i in range(count)],
        seed=range(count),
        max_new_tokens=LIMIT,
    )


def assert_person(text):
    value = json.loads(text)
    assert list(value) == ["name", "kind", "age", "tags"]
    assert len(value["name"]) <= 6 and value["kind"] in ("cat", "dog") and 0 <= value["age"] <= 99
    assert len(value["tags"]) <= 2 and all(isinstance(tag, bool) for tag in value["tags"])


def test_every_text_is_valid_at_any_temperature(sampled):
    for done in sampled:
        assert done.finish_reason == "stop"
        assert_person(done.text)
    assert len({done.text for done in sampled}) > 28


def test_no_illegal_id_is_chosen(sampled, tokenizer):
    for done in sampled:
        assert max(done.token_ids) < tokenizer.vocab_size
        assert not set(done.token_ids) & set(tokenizer.special_ids.values())
        assert tokenizer.decode(done.token_ids) == done.text


def test_rows_are_what_they_would_be_alone(model, tokenizer, sampled):
    for i in (1, 6):
        alone = generate(
            model,
            tokenizer,
            PROMPTS[i % 3],
            schema=PERSON,
            temperature=1.0 + (i % 2),
            seed=i,
            max_new_tokens=LIMIT,
        )
        assert alone.token_ids == sampled[i].token_ids
        np.testing.assert_allclose(alone.log_probs, sampled[i].log_probs, atol=2e-5)


def naive(model, compiler, ids, kind, text):
    """Greedy text with all logits masked, without cache; and log-probabilities before the mask."""
    constraint, new, log_probs = compiler.constraint(kind, text), [], []
    while not constraint.complete:
        tokens_BT = (
            jnp.zeros((1, 192), jnp.int32).at[0, : len(ids) + len(new)].set(jnp.array([*ids, *new]))
        )
        logits_V = np.asarray(forward(model, tokens_BT).logits[0, len(ids) + len(new) - 1])
        bits = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[:V]
        new.append(int(np.argmax(np.where(bits, logits_V, -np.inf))))
        log_probs.append(logits_V[new[-1]] - np.log(np.sum(np.exp(logits_V))))
        constraint.accept(new[-1:])
    return new, log_probs


@pytest.mark.parametrize("read_ahead", [True, False])
def test_greedy_text_is_that_of_masked_logits(model, tokenizer, compiler, read_ahead):
    ids = tokenizer.encode(PROMPTS[0], bos=True)
    expected, log_probs = naive(model, compiler, ids, "schema", json.dumps(PERSON))
    session = ConstrainedSession(
        model,
        1,
        len(ids) + LIMIT,
        constraints=[compiler.constraint("schema", json.dumps(PERSON))],
        read_ahead=read_ahead,
        stop_ids=tokenizer.stop_ids,
    )
    session.prefill([ids], max_new_tokens=LIMIT)
    assert session.decode(5) == [expected[:5]]  # a limit may end a run of forced tokens
    assert session.decode(LIMIT) == [expected]
    assert session.done == [True]
    np.testing.assert_allclose(session.log_probs[0], log_probs, atol=2e-5)


def test_reading_forced_tokens_ahead_changes_no_sampled_text(model, tokenizer, compiler, sampled):
    count = 4
    session = ConstrainedSession(
        model,
        count,
        160,
        constraints=[compiler.constraint("schema", json.dumps(PERSON)) for _ in range(count)],
        read_ahead=False,
        sampling=[Sampling(temperature=1.0 + (i % 2)) for i in range(count)],
        seeds=list(range(count)),
        stop_ids=tokenizer.stop_ids,
    )
    prompts = [tokenizer.encode(PROMPTS[i % 3], bos=True) for i in range(count)]
    session.prefill(prompts, max_new_tokens=LIMIT, run=True)
    assert session.chosen == [done.token_ids for done in sampled[:count]]


def test_steps_compile_nothing(model, tokenizer, sampled):
    before = advance._cache_size(), read_forced._cache_size()
    generate(
        model,
        tokenizer,
        [PROMPTS[i % 3] for i in range(32)],
        regex="(one|two|three) and a [a-z]{3,20}",  # another grammar
        sampling=[Sampling(temperature=1.0 + (i % 2)) for i in range(32)],
        max_new_tokens=LIMIT,
    )
    assert (advance._cache_size(), read_forced._cache_size()) == before


def test_rows_without_a_constraint_go_on_beside(model, tokenizer, compiler):
    ids = tokenizer.encode(PROMPTS[1], bos=True)
    plain = generate(model, tokenizer, [ids], max_new_tokens=20, stop_ids=())[0].token_ids
    session = ConstrainedSession(
        model, 2, 64, constraints=[None, compiler.constraint("regex", "nine and nine")]
    )
    session.prefill([ids, ids], max_new_tokens=20)
    session.decode(20)
    assert session.chosen[0] == plain
    assert tokenizer.decode(session.chosen[1]) == "nine and nine"


def test_a_text_cut_by_length_says_so(model, tokenizer):
    done = generate(model, tokenizer, "Read", schema=Model, max_new_tokens=5)
    assert done.finish_reason == "length" and len(done.token_ids) == 5 and done.parsed is None
    done = generate(model, tokenizer, "Read", regex="ab", max_new_tokens=2, stop_ids=[1])
    assert done.text == "ab" and done.finish_reason == "stop"


class Model:
    """Has what a pydantic model has."""

    @staticmethod
    def model_json_schema():
        return PERSON

    @staticmethod
    def model_validate_json(text):
        return ("parsed", json.loads(text)["age"])


def test_a_model_class_gives_its_object(model, tokenizer):
    done = generate(model, tokenizer, "Read", schema=Model, max_new_tokens=LIMIT)
    assert done.parsed == ("parsed", json.loads(done.text)["age"])


def test_pydantic(model, tokenizer):
    pydantic = pytest.importorskip("pydantic")

    class Person(pydantic.BaseModel):
        kind: bool
        size: int = pydantic.Field(ge=0, le=9)

    done = generate(model, tokenizer, "Read", schema=Person, max_new_tokens=LIMIT)
    assert isinstance(done.parsed, Person) and done.parsed.model_dump() == json.loads(done.text)


def test_streams_are_the_same_text(model, tokenizer):
    text = stream(model, tokenizer, "Read", schema=Model, max_new_tokens=LIMIT)
    pieces = list(text)
    done = generate(model, tokenizer, "Read", schema=Model, max_new_tokens=LIMIT)
    assert "".join(pieces) == done.text and len(pieces) > 1
    assert text.completion.token_ids == done.token_ids and text.completion.parsed == done.parsed


def test_what_does_not_go_together_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="drafts do not follow a grammar"):
        generate(model, tokenizer, "Read", regex="a", draft=model)
    with pytest.raises(ValueError, match="schema or lark, not both"):
        generate(model, tokenizer, "Read", schema={}, lark="start: a")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        generate(model, None, [[2, 3]], regex="a")
    with pytest.raises(ValueError, match="the stop token 8"):
        generate(model, tokenizer, "Read", regex="a", stop_ids=tokenizer.encode("0"))
