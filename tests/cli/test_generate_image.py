"""`gemma-jax generate --image`."""

import json

import pytest

import gemma_jax as gj

FEW = ("--max-new-tokens", 4, "--json")
SPAN = [6, *[320] * 4, 7]  # start, soft tokens, end


@pytest.fixture
def ask(cli, seer):
    """`ask(prompt, *options)`: what `generate --json` tells."""

    def call(*words) -> dict:
        ran = cli("generate", *words, "--model", seer, *FEW)
        assert (ran.code, ran.err) == (0, "")
        return json.loads(ran.out)

    return call


@pytest.fixture(scope="module")
def tok(seer):
    return gj.load_tokenizer(seer)


def test_as_in_python(ask, seer, picture):
    files = [picture("a.png"), picture("b.png", level=200)]
    told = ask("Who is it?", "--image", files[0], "--image", files[1], "--dtype", "float32")
    model, tok = gj.load(seer, dtype="float32")
    done = gj.generate(model, tok, "Who is it?", images=files, max_new_tokens=4)
    assert told["prompt_token_ids"] == done.prompt_token_ids
    assert told["token_ids"] == done.token_ids
    assert told["text"] == done.text


def test_images_come_first(ask, tok, picture):
    ids = ask("Who?", "--image", picture("a.png"), "--raw")["prompt_token_ids"]
    nl = tok.id_of("\n")
    assert ids == [2, nl, nl, *SPAN, nl, nl, *tok.encode("Who?")]


def test_images_go_where_the_prompt_says(ask, tok, picture):
    words = ("--image", picture("a.png"), "--image", picture("b.png"))
    ids = ask("of <start_of_image> and <start_of_image>", *words)["prompt_token_ids"]
    nl = "\n\n"
    parts = [tok.encode(part) for part in (f"of {nl}", f"{nl} and {nl}", nl)]
    assert ids == [2, *parts[0], *SPAN, *parts[1], *SPAN, *parts[2]]


def test_chat_puts_images_into_the_message(ask, tok, picture):
    ids = ask(" Who? ", "--image", picture("a.png"), "--chat")["prompt_token_ids"]
    before, after = (
        "<bos><start_of_turn>user\n\n\n",
        "\n\nWho?<end_of_turn>\n<start_of_turn>model\n",
    )
    assert ids == [*tok.encode(before), *SPAN, *tok.encode(after)]


def test_the_image_counts(ask, picture):
    dark, light = (ask("Who?", "--image", picture(f"{n}.png", level=n)) for n in (0, 255))
    assert dark["prompt_token_ids"] == light["prompt_token_ids"]
    assert dark["log_probs"] != light["log_probs"]


@pytest.mark.parametrize(("width", "views"), [(300, 1), (600, 3), (900, 4)])
def test_pan_and_scan(ask, picture, width, views):
    words = ("Who?", "--image", picture("a.png", width=width))
    assert ask(*words)["prompt_token_ids"].count(6) == 1
    ids = ask(*words, "--pan-and-scan")["prompt_token_ids"]
    assert (ids.count(6), ids.count(320)) == (views, 4 * views)


@pytest.fixture
def unloadable(monkeypatch):
    """What follows must be found out before weights are read."""

    def fail(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("gemma_jax.loading.load_model", fail)


def test_model_without_a_tower(refused, talker, picture, unloadable):
    words = ("generate", "Who?", "--image", picture("a.png"), "--model", talker)
    assert "has no vision tower" in refused(*words)


def test_unreadable_images(refused, seer, tmp_path, unloadable):
    (tmp_path / "text.png").write_text("no image")
    for name, message in [
        ("text.png", "text.png"),
        ("none.png", "none.png"),
        ("", "Is a directory"),
    ]:
        words = ("generate", "Who?", "--image", tmp_path / name, "--model", seer)
        assert message in refused(*words)


def test_numbers_must_match(refused, seer, picture):
    marked = "<start_of_image> <start_of_image>"
    words = ("generate", marked, "--image", picture("a.png"), "--model", seer)
    assert ": 2, images given: 1" in refused(*words)
    assert ": 2, images given: 0" in refused("generate", marked, "--model", seer)


def test_inputs_hold_their_own_images(refused, seer, picture, stored):
    file = stored(input_ids=[[5, 6]])
    words = ("generate", "--inputs", file, "--image", picture("a.png"), "--model", seer)
    assert "--image and --audio go with a PROMPT" in refused(*words)
