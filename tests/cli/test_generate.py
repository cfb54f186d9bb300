"""`gemma-jax generate`."""

import json

import pytest
from marks import nightly
from parity.goldens import DATA
from safetensors.numpy import load_file

FEW = ("--max-new-tokens", 6)


def json_of(ran) -> dict:
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


def test_text_to_stdout_and_nothing_to_stderr(cli, talker):
    ran = cli("generate", "The capital", "--model", talker, *FEW)
    assert (ran.code, ran.err) == (0, "")
    told = json_of(cli("generate", "The capital", "--model", talker, *FEW, "--json"))
    assert ran.out == told["text"] + "\n"


def test_json_holds_the_whole_story(cli, talker):
    told = json_of(cli("generate", "The capital", "--model", talker, *FEW, "--json"))
    assert told["prompt_token_ids"][0] == 2
    assert len(told["token_ids"]) == len(told["log_probs"]) == 6
    assert told["finish_reason"] == "length"
    assert told["timings"].keys() == {"load_s", "generate_s", "first_token_s"}


def test_prompt_from_stdin_is_taken_as_it_is(cli, talker):
    words = ("--model", talker, *FEW, "--json")
    piped = json_of(cli("generate", "-", *words, stdin=b" capital\r\n"))
    assert (
        piped["prompt_token_ids"]
        == json_of(cli("generate", " capital\r\n", *words))["prompt_token_ids"]
    )


def test_chat_template(cli, talker):
    words = ("generate", "Hi", "--model", talker, *FEW, "--json")
    raw, chat = (json_of(cli(*words, mode))["prompt_token_ids"] for mode in ("--raw", "--chat"))
    assert len(chat) > len(raw)
    assert chat.count(2) == raw.count(2) == 1


def test_stop_text_is_cut_off(cli, talker):
    words = ("generate", "The capital", "--model", talker, *FEW, "--json")
    whole = json_of(cli(*words))["text"]
    stop = whole[3:5]
    cut = json_of(cli(*words, "--stop", stop, "--stop", "no such text"))
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_seeds(cli, talker):
    words = ("generate", "The", "--model", talker, *FEW, "--json")
    sampling = ("--temperature", 1.5, "--top-k", 200, "--top-p", 0.99, "--min-p", 0.001)
    options = (*sampling, "--repetition-penalty", 1.1, "--presence-penalty", 0.1)
    runs = [json_of(cli(*words, *options, "--seed", s))["token_ids"] for s in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]


def test_penalties_on_what_was_chosen(cli, talker):
    """Without sampling, 40 tokens of a tiny model repeat themselves; punished, they do less."""
    words = ("generate", "The", "--model", talker, "--max-new-tokens", 40, "--json")
    plain, punished = (
        json_of(cli(*words, *options))["token_ids"] for options in ((), ("--frequency-penalty", 2))
    )
    assert len(set(plain)) < len(set(punished))


@pytest.mark.parametrize("weights", ["int8", *nightly("bfloat16")])
def test_narrow_weights(cli, talker, weights):
    words = ("generate", "The", "--model", talker, "--max-new-tokens", 2, "--json")
    assert len(json_of(cli(*words, "--weights", weights))["token_ids"]) == 2


@pytest.mark.parametrize("case", ["generate_left_pad", *nightly("generate")])
def test_stored_inputs_continue_as_in_transformers(cli, mute, case):
    file = DATA / "g3_text" / f"{case}.safetensors"
    expected = load_file(file)["out.gen_ids"].tolist()
    words = ("generate", "--inputs", file, "--model", mute, "--max-new-tokens", len(expected[0]))
    told = json_of(cli(*words, "--json"))
    assert told["token_ids"] == expected
    assert cli(*words).out.splitlines() == [" ".join(map(str, row)) for row in expected]


def test_images_as_in_transformers(cli):
    file = DATA / "g3_mm" / "generate.safetensors"
    words = ("--model", file.parent, "--inputs", file, "--max-new-tokens", 24)
    told = json_of(cli("generate", *words, "--json"))
    assert told["token_ids"] == load_file(file)["out.gen_ids"].tolist()


def test_stored_inputs_become_text_where_there_is_a_tokenizer(cli, talker, stored):
    file = stored(input_ids=[[0, 2, 30], [2, 31, 32]], attention_mask=[[0, 1, 1], [1, 1, 1]])
    told = json_of(cli("generate", "--inputs", file, "--model", talker, *FEW, "--json"))
    assert told["prompt_token_ids"] == [[2, 30], [2, 31, 32]]
    assert all(told["text"])


def test_context_bounds_the_continuation(cli, talker, stored):
    file = stored(input_ids=[[30] * 505])  # of 512
    words = ("generate", "--inputs", file, "--model", talker, "--json")
    assert len(json_of(cli(*words))["token_ids"][0]) == 7


def test_prompt_beyond_the_context(refused, mute, stored):
    file = stored(input_ids=[[5] * 600])
    assert "context of 512" in refused("generate", "--inputs", file, "--model", mute)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "-1"], "--temperature -1.0 must be"),
        (["--temperature", "nan"], "--temperature nan must be"),
        (["--top-p", "0"], "--top-p 0.0 must be"),
        (["--top-k", "-1"], "--top-k -1 must be"),
        (["--top-k", "1.5"], "--top-k"),
        (["--min-p", "2"], "--min-p 2.0 must be"),
        (["--repetition-penalty", "0"], "--repetition-penalty 0.0 must be"),
        (["--presence-penalty", "3"], "--presence-penalty 3.0 must be between -2 and 2"),
        (["--max-new-tokens", "0"], "--max-new-tokens"),
        (["--stop", ""], "--stop"),
        (["--stop", "a"], "tokenizer"),
        (["--seed", "x"], "--seed"),
        (["--attention-impl", "magic"], "choose one of: auto, tpu, hopper, cudnn, xla, reference"),
    ],
)
def test_impossible_values(refused, mute, stored, words, message):
    file = stored(input_ids=[[5, 6]])
    assert message in refused("generate", "--inputs", file, "--model", mute, *words)


@pytest.mark.parametrize("words", [[], ["hi", "--inputs", DATA / "g3_text/forward.safetensors"]])
def test_either_a_prompt_or_inputs(refused, mute, words):
    assert "PROMPT or --inputs" in refused("generate", "--model", mute, *words)


def test_empty_prompt(refused, talker):
    assert "the prompt is empty" in refused("generate", "", "--model", talker)
    assert "the prompt is empty" in refused("generate", "-", "--model", talker)


def test_prompt_that_is_no_utf8(refused, talker):
    wrong = refused("generate", "-", "--model", talker, stdin=b"caf\xe9")
    assert "not valid UTF-8 at byte 3" in wrong
    assert wrong == refused("generate", "caf\udce9", "--model", talker)  # as argv has it
