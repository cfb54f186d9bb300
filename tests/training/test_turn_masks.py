"""Which tokens are trained: by hand, and by transformers' mask of what the assistant says."""

import json

import numpy as np
import pytest
from examples_on_disk import DATA, chat, picture, seer_cfg, tokenizer

from gemma_jax.multimodal.modality import modalities_of
from gemma_jax.multimodal.prompts import PromptReader
from gemma_jax.text import ChatTemplate, Tokenizer, encode_chat
from gemma_jax.text.tokenizer_config import TokenizerConfig
from gemma_jax.training.data.documents import DocumentReader
from gemma_jax.training.data.examples import Chat, Plain, examples_of

STORED = json.loads((DATA / "turn_masks.json").read_text("utf-8"))["cases"]


def read(example, *, modalities=(), tok=None, **options):
    return DocumentReader(tok or tokenizer(), modalities, **options).read(example)


def shown(document):
    """The text, what is trained in brackets."""
    tok, text, inside = tokenizer(), "", False
    for i, trained in zip(document.ids.tolist(), document.trained.tolist()):
        text += ("[" if trained else "]") * (trained != inside) + tok.decode([i])
        inside = trained
    return text + "]" * bool(inside)


def turns(*texts):
    return Chat(chat(*texts)["messages"])


@pytest.mark.parametrize(
    ("example", "options", "expected"),
    [
        (
            turns("Hi", " Hello \n"),
            {},
            "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
            "[Hello<end_of_turn>\n]",
        ),
        (
            turns("a", "b", "c", "d", "e"),
            {},
            "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n[b<end_of_turn>\n]"
            "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n[d<end_of_turn>\n]"
            "<start_of_turn>user\ne<end_of_turn>\n",
        ),
        (
            turns("a", "b", "c", "d"),
            {"train_on": "last_answer"},
            "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
            "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n[d<end_of_turn>\n]",
        ),
        (
            turns("a", "b"),
            {"train_on": "all"},
            "<bos>[<start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n]",
        ),
        (
            Chat(chat("a", "b", "c", "d")["messages"], given=3),
            {"train_on": "all"},
            "<bos><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n"
            "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n[d<end_of_turn>\n]",
        ),
        (Plain("the dog"), {}, "<bos>[the dog<eos>]"),
        (Plain("the dog"), {"end_of_text": False}, "<bos>[the dog]"),
        (Plain(" 4", "2 + 2 ="), {}, "<bos>2 + 2 =[ 4<eos>]"),
        (Plain(" 4", "2 + 2 ="), {"train_on": "all"}, "<bos>[2 + 2 = 4<eos>]"),
        (Plain("4", ""), {}, "<bos>[4<eos>]"),
    ],
)
def test_by_hand(example, options, expected):
    assert shown(read(example, **options)) == expected


@pytest.mark.parametrize("case", STORED, ids=lambda case: f"{case['name']}-{len(case['messages'])}")
def test_transformers_says_the_same(case):
    document = read(Chat(case["messages"]))
    assert document.ids.tolist() == case["ids"]
    assert document.trained.astype(int).tolist() == case["mask"]
    assert document.ids.tolist() == encode_chat(
        tokenizer(), case["messages"], add_generation_prompt=False
    )


def test_a_template_of_another_kind():
    """Spans come from rendering the conversation message by message."""
    text = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    config = TokenizerConfig(chat_template=ChatTemplate(text, "chat_template.jinja", {}, True))
    tok = Tokenizer.from_file(DATA / "tokenizer.json", config)
    document = read(turns("a", "b"), tok=tok)
    assert shown(document) == "<bos><user>a</s>\n<assistant>[b</s>\n]"
    assert document.ids.tolist() == encode_chat(
        tok, chat("a", "b")["messages"], add_generation_prompt=False
    )


def test_a_template_that_changes_what_was_said_before():
    text = "{% for m in messages %}{{ loop.length }}{{ m['role'] }}{{ m['content'] }}{% endfor %}"
    config = TokenizerConfig(chat_template=ChatTemplate(text, "chat_template.jinja", {}))
    tok = Tokenizer.from_file(DATA / "tokenizer.json", config)
    with pytest.raises(ValueError, match="message by message"):
        read(turns("a", "b", "c", "d"), tok=tok)


@pytest.mark.parametrize("pan_and_scan", [False, True])
def test_images_move_the_answer_and_are_not_trained(tmp_path, pan_and_scan):
    wide = picture(tmp_path / "wide.png", size=(300, 1500))
    items = [{"type": "text", "text": "what"}, {"type": "image", "path": wide}]
    row = chat(items, "Räk [1]", ["and", {"type": "image", "image": wide}], "dog")
    (example,) = examples_of(row, tmp_path, pairs=False)
    cfg = seer_cfg()
    modalities = modalities_of(cfg, pan_and_scan=pan_and_scan)
    document = read(example, modalities=modalities)
    crops = len(document.runs) // 2
    assert (crops > 1) == pan_and_scan
    said = [i for i, trained in zip(document.ids.tolist(), document.trained) if trained]
    tok = tokenizer()
    assert tok.decode(said) == "Räk [1]<end_of_turn>\ndog<end_of_turn>\n"
    asked = PromptReader(tok, modalities).chat(example.messages[:3]).token_ids
    assert document.ids[: len(asked)].tolist() == asked  # as the model will be asked
    everything = read(example, modalities=modalities, train_on="all")
    vision = cfg.vision
    around = [vision.image_token, vision.start_token, vision.end_token, tok.bos_id]
    np.testing.assert_array_equal(everything.trained, ~np.isin(document.ids, around))


def test_a_text_with_an_image(tmp_path):
    modalities = modalities_of(seer_cfg())
    media = {"image": [tmp_path / picture(tmp_path / "a.png")]}
    document = read(Plain("see <start_of_image> the dog", media=media), modalities=modalities)
    (run,) = document.runs
    assert (document.ids[run.start : run.start + run.size] == 530).all()
    assert run.values.shape == (3, 56, 56)
    assert document.trained.sum() == len(document.ids) - 1 - (run.size + 2)


def test_cutting_leaves_images_whole(tmp_path):
    modalities = modalities_of(seer_cfg())
    media = {"image": [tmp_path / picture(tmp_path / "a.png")]}
    whole = read(Plain("see <start_of_image> the dog", media=media), modalities=modalities)
    begin, end = whole.runs[0].start - 1, whole.runs[0].start + 5
    for length in range(1, len(whole.ids) + 3):
        document = whole.cut(length)
        expected = begin if begin < length < end else min(length, len(whole.ids))
        assert len(document.ids) == len(document.trained) == expected
        assert len(document.runs) == (length >= end)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (turns("a"), "nothing to train on"),
        (Plain("the <bos> dog"), "<bos> stands inside"),
        (Plain(" <bos>dog", "the"), "<bos> stands inside"),
        (turns("a", "b", "c", "<bos>"), "<bos> stands inside"),
        (Chat([{"role": "tool", "content": "a"}]), "expected role 'user' .* got 'tool'"),
        (Chat(chat("a", "b")["messages"][::-1]), "must alternate"),
    ],
)
def test_refused(example, message):
    with pytest.raises(ValueError, match=message):
        read(example)


def test_answers_are_text(tmp_path):
    image = {"type": "image", "path": picture(tmp_path / "a.png")}
    (example,) = examples_of(chat("draw", [image]), tmp_path, pairs=False)
    with pytest.raises(ValueError, match="message 1 is an answer with more than text"):
        read(example, modalities=modalities_of(seer_cfg()))


def test_a_vocabulary_without_turns():
    import gemma_jax as gj

    tok = gj.load_tokenizer("checkpoints/elastic")
    with pytest.raises(ValueError, match="no <start_of_turn>; give prompts and completions"):
        read(turns("a", "b"), tok=tok)
    assert read(Plain("b", "a"), tok=tok).trained.tolist()[0] is False
