"""The chat format is the official one."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_samples import DATA, TEXTS, patient

from gemma_jax.text import (
    GEMMA3N_MEDIA,
    chat,
    encode_chat,
    images_of,
    render,
    render_next,
    render_turn,
)

STORED = json.loads((DATA / "chat.json").read_text(encoding="utf-8"))
USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize("stored", STORED["chats"])
def test_rendered_as_stored(stored):
    prompt = stored["add_generation_prompt"]
    assert render(stored["messages"], add_generation_prompt=prompt) == stored["rendered"]


@pytest.mark.parametrize("stored", STORED["invalid"])
def test_refused_as_stored(stored):
    with pytest.raises(ValueError) as caught:
        render(stored["messages"])
    assert stored["message"] in str(caught.value)


ITEMS = st.lists(
    st.one_of(st.just({"type": "image"}), TEXTS.map(lambda text: {"type": "text", "text": text})),
    max_size=4,
)
SYSTEMS = st.one_of(TEXTS, TEXTS.map(lambda text: [{"type": "text", "text": text}]))


@st.composite
def conversations(draw, contents=st.one_of(TEXTS, ITEMS)):
    roles = ["user", "assistant"] * 3
    roles = roles[: draw(st.integers(1, 6))]
    messages = [{"role": role, "content": draw(contents)} for role in roles]
    system = draw(st.one_of(st.none(), SYSTEMS))
    return ([] if system is None else [{"role": "system", "content": system}]) + messages


@patient
@given(messages=conversations(), prompt=st.booleans())
def test_rendered_as_the_official_template(messages, prompt):
    jinja2 = pytest.importorskip("jinja2", reason="runs the official template")
    template = jinja2.Environment().from_string(STORED["chat_template"])
    expected = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=prompt)
    assert render(messages, add_generation_prompt=prompt) == expected


@patient
@given(messages=conversations(contents=TEXTS))
def test_increments_add_up(tokenizer, messages):
    """What a kept cache is fed, answers included, is what a fresh one would be."""
    system = messages.pop(0) if messages[0]["role"] == "system" else None
    messages = messages[: len(messages) - (len(messages) % 2 == 0)]  # the user spoke last
    parts = []
    for i, message in enumerate(messages):
        if message["role"] == "user":
            first = i == 0
            part = render_next(message, first=first, system=system if first else None)
        else:
            part = message["content"].strip()
        parts.append(part)
    whole = ([system] if system else []) + messages
    assert "".join(parts) == render(whole)
    ids = [i for part in parts for i in tokenizer.encode(part)]
    assert ids == encode_chat(tokenizer, whole)


def test_turns_and_media():
    assert render_turn({"role": "model", "content": " yes\n"}) == (
        "<start_of_turn>model\nyes<end_of_turn>\n"
    )
    items = [{"type": "audio"}, {"type": "image"}, {"type": "text", "text": " what? "}]
    assert render_turn({"role": "user", "content": items}, media=GEMMA3N_MEDIA) == (
        "<start_of_turn>user\n<audio_soft_token><image_soft_token>what?<end_of_turn>\n"
    )
    assert render([USER]).endswith(chat.GENERATION_PROMPT)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "at least one user message"),
        ([{"role": "system", "content": "x"}], "at least one user message"),
        ([{"role": "user"}], "Invalid content type"),
        ([{"role": "user", "content": 3}], "Invalid content type"),
        ([{"role": "user", "content": {"type": "text"}}], "Invalid content type"),
        ([{"role": "user", "content": ["text", 3]}], "Invalid content type"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "'audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "'text' .with a text."),
        ([{"content": "x"}], "'role'"),
        (["x"], "'role'"),
        ([USER, {"role": "tool", "content": "x"}], "got 'tool'"),
        ([USER, {"role": "system", "content": "x"}], "got 'system'"),
        ([{"role": "system", "content": []}, USER], "one text"),
        ([{"role": "system", "content": [{"type": "image"}]}, USER], "one text"),
    ],
)
def test_refused(messages, match):
    with pytest.raises(ValueError, match=match):
        render(messages)


ARRAY = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize("source", [Path("cat.png"), b"a file", bytearray(b"a file"), ARRAY])
def test_an_image_may_stand_where_an_item_may(source):
    image, what = {"type": "image", "image": source}, {"type": "text", "text": " what? "}
    for short, long in [(source, [image]), ([source, " what? "], [image, what])]:
        short, long = ([{"role": "user", "content": content}] for content in (short, long))
        assert render(short) == render(long)
        assert "user\n<start_of_image>" in render(short)
        assert images_of(short)[0] is images_of(long)[0] is source


def test_images_with_pillow_and_of_ours():
    pytest.importorskip("PIL", reason="images need the extra `vision`")
    from gemma_jax import Image

    image = Image(ARRAY)
    messages = [{"role": "user", "content": [image, image.to_pil(), "which?"]}]
    assert "user\n<start_of_image><start_of_image>which?<" in render(messages)
    assert images_of(messages)[0] is image and len(images_of(messages)) == 2


def test_images_come_in_the_order_of_their_markers():
    """From every turn; the official template marks those of the model as well."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "path": "1.png"}, "and", Path("2.png")]},
        {"role": "model", "content": [{"type": "image", "url": "3.png"}]},
        {
            "role": "user",
            "content": [{"type": "text", "text": "and"}, {"type": "image", "image": 4}],
        },
    ]
    assert images_of(messages) == ["1.png", Path("2.png"), "3.png", 4]
    assert render(messages).count("<start_of_image>") == 4


def test_a_string_is_a_text():
    messages = [{"role": "user", "content": ["cat.png", " what? "]}]
    assert images_of(messages) == []
    assert "user\ncat.pngwhat?<" in render(messages)


def test_placeholders_have_no_image():
    messages = [{"role": "user", "content": [{"type": "image"}]}]
    assert "<start_of_image>" in render(messages)
    with pytest.raises(ValueError, match="one of .'image', 'path', 'url'."):
        images_of(messages)


def test_no_image_in_a_system_text():
    with pytest.raises(ValueError, match="one text"):
        render([{"role": "system", "content": Path("cat.png")}, USER])


def test_refused_increments():
    with pytest.raises(ValueError, match="from 'user', got 'model'"):
        render_next({"role": "model", "content": "x"}, first=True)
    with pytest.raises(ValueError, match="first=True"):
        render_next(USER, first=False, system={"role": "system", "content": "x"})
    with pytest.raises(ValueError, match="from 'system', got 'user'"):
        render_next(USER, first=True, system=USER)
