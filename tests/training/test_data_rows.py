"""Rows of files: what is read, and what is refused by file and line."""

from dataclasses import replace
from pathlib import Path

import pytest
from examples_on_disk import chat, picture, reader_cfg, seer_cfg, tokenizer, words, write

from gemma_jax import DataSettings, describe
from gemma_jax.training.data.examples import Chat, Plain, examples_of
from gemma_jax.training.data.files import find_files, lines_of, parse

HERE = Path("folder")
ASK = [{"role": "user", "content": "a"}]
SAY = [{"role": "assistant", "content": "b"}]


def settings(files, **changes):
    fields = dict(files=files, tokens_per_row=64, rows=2, shuffle=False)
    return DataSettings(**(fields | changes))


def report(files, cfg=None, **changes):
    return describe(settings(files, **changes), tokenizer(), cfg or reader_cfg())


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": ASK + SAY}, Chat(ASK + SAY)),
        ({"text": "a"}, Plain("a")),
        ({"prompt": "a", "completion": "b"}, Plain("b", "a")),
        ({"prompt": ASK, "completion": SAY}, Chat(ASK + SAY, 1)),
        ({"prompt": ASK, "completion": "b"}, Chat(ASK + SAY, 1)),
        ({"text": "a", "images": ["c.png"]}, Plain("a", media={"image": [HERE / "c.png"]})),
        ({"text": "a", "prompt": None}, Plain("a")),
    ],
)
def test_kinds_of_rows(row, expected):
    row = {key: value for key, value in row.items() if value is not None}  # as `parse` does
    assert examples_of(row, HERE, pairs=False) == (expected,)


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, Plain("b", "a"), Plain("c", "a")),
        ({"messages": ASK, "chosen": "b", "rejected": "c"}, "b", "c"),
        ({"prompt": ASK, "chosen": SAY, "rejected": "c"}, "b", "c"),
        (
            {"chosen": ASK + SAY, "rejected": [*ASK, {"role": "assistant", "content": "c"}]},
            "b",
            "c",
        ),
    ],
)
def test_pairs(row, chosen, rejected):
    def example(answer):
        said = [{"role": "assistant", "content": answer}]
        return answer if isinstance(answer, Plain) else Chat(ASK + said, 1)

    expected = example(chosen), example(rejected)
    assert examples_of(row, HERE, pairs=True) == expected


def test_media_of_messages():
    items = ["a", {"type": "image", "image": "x.png"}, {"type": "audio"}, {"type": "image"}]
    row = chat(items, "b") | {"images": ["y.png"], "audio": ["/z.wav"]}
    (example,) = examples_of(row, HERE, pairs=False)
    assert example.messages[0]["content"] == [
        "a",
        {"type": "image", "image": HERE / "x.png"},
        {"type": "audio", "audio": Path("/z.wav")},
        {"type": "image", "image": HERE / "y.png"},
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "expected messages or text or prompt and completion, got nothing"),
        ({"text": "a", "label": 3}, "unknown key 'label'; name it in ignore"),
        ({"prompt": "a"}, "expected messages or .*, got prompt"),
        ({"text": "a", "messages": ASK}, "got messages, text"),
        ({"text": 3}, "text must be a text, got int"),
        ({"text": ""}, "text is empty"),
        ({"prompt": "a", "completion": ""}, "the completion is empty"),
        ({"prompt": "a", "completion": SAY}, "got str and list"),
        ({"messages": "a"}, "messages must be a list, got str"),
        ({"messages": ["a"]}, "expected a message"),
        ({"messages": [{"role": "user"}]}, "got role; name in ignore"),
        ({"messages": [{**ASK[0], "name": "x"}]}, "got role, content, name; name in ignore"),
        ({"messages": [{"role": "user", "content": 3}]}, "a content is a text or a list, got 3"),
        (chat([{"type": "video"}]), "expected items of type text, image or audio"),
        (chat([{"type": "image", "url": "x"}]), "unknown key 'url' in an item of type image"),
        (chat([{"type": "image", "image": "a", "path": "a"}]), "one path of a file"),
        (chat([{"type": "image"}]), "without a path, and no file for it"),
        (chat("a", "b", images=["a.png"]), "more image files than items"),
        ({"text": "a", "images": "a.png"}, "images must be a list of paths"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "the row is a preference; set pairs"),
    ],
)
def test_rows_that_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        examples_of(row, HERE, pairs=False)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "unknown key 'text'"),
        ({"prompt": "a", "chosen": "b"}, "expected prompt, chosen and rejected or"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": SAY, "rejected": ASK}, "no message in common"),
        ({"messages": "a", "chosen": "b", "rejected": "c"}, "messages must be a list"),
    ],
)
def test_pairs_that_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        examples_of(row, HERE, pairs=True)


@pytest.mark.parametrize("logps", [(-1, None), (-1, "a"), (-1, 0.5), (True, -1)])
def test_references_that_are_refused(tmp_path, logps):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    row |= dict(zip(("ref_chosen_logps", "ref_rejected_logps"), logps))
    with pytest.raises(ValueError, match="must be two numbers, none above 0"):
        report(write(tmp_path / "a.jsonl", [row]), pairs=True)
    with pytest.raises(ValueError, match="NaN|two numbers"):
        report(write(tmp_path / "b.jsonl", [row | {"ref_chosen_logps": float("nan")}]), pairs=True)


def test_references_of_some_rows(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    more = row | {"ref_chosen_logps": -1, "ref_rejected_logps": -2.5}
    with pytest.raises(ValueError, match="1 of 2 rows have log-probabilities of a reference"):
        report(write(tmp_path / "a.jsonl", [row, more]), pairs=True)


def test_keys_to_ignore():
    row = {"text": "a", "label": 3}
    assert examples_of(row, HERE, pairs=False, ignore=["label"]) == (Plain("a"),)
    row = chat([{"type": "text", "text": "a", "detail": 1}])
    row["messages"][0]["name"] = "x"
    (example,) = examples_of(row, HERE, pairs=False, ignore=["name", "detail"])
    assert example.messages == [{"role": "user", "content": [{"type": "text", "text": "a"}]}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "no JSON: .* at character 1"),
        (b"[1]", "expected an object .*, got list"),
        (b'{"text": "a", "text": "b"}', "the key 'text' stands twice"),
        (b'{"text": "\xff"}', "no UTF-8: .* at byte 10"),
        (b"[" * 100_000, "lists in lists|no JSON"),
    ],
)
def test_lines_that_are_refused(line, message):
    with pytest.raises(ValueError, match=message):
        parse(line)


def test_lines():
    assert parse(b'\xef\xbb\xbf{"text": "a", "b": null}\r\n') == {"text": "a"}


def test_files_folders_and_patterns(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    for name in ("a.jsonl", "b/2.jsonl", "b/10.jsonl", "b/c/3.jsonl", "b/other.txt"):
        write(tmp_path / name, [{"text": "a"}])

    def names(*files):
        return [
            str(p.relative_to(tmp_path)) for p in find_files([str(tmp_path / f) for f in files])
        ]

    assert names("b", "a.jsonl") == ["b/10.jsonl", "b/2.jsonl", "b/c/3.jsonl", "a.jsonl"]
    assert names("*.jsonl", "b/[12]*.jsonl") == ["a.jsonl", "b/10.jsonl", "b/2.jsonl"]
    for wrong, message in {
        "none.jsonl": "there is no such file",
        "x*.jsonl": "no file has such a name",
        "b/other.txt": "expected a file of JSON Lines",
    }.items():
        with pytest.raises(ValueError, match=message):
            names(wrong)
    with pytest.raises(ValueError, match=r"a\.jsonl is named twice"):
        names("a.jsonl", "*.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found none"):
        names("empty")


def test_places_lead_back(tmp_path):
    name = write(tmp_path / "a.jsonl", ['{"text": "ä"}', "", "  ", '{"text": "b"}'])
    places = [place for place, _ in lines_of(Path(name))]
    assert [str(place) for place in places] == [f"{name}:1", f"{name}:4"]
    assert [parse(place.read())["text"] for place in places] == ["ä", "b"]


def test_bad_rows_are_named_in_one_error(tmp_path):
    rows = [{"text": "a"}, "{", {"label": 1}, *[{"text": 3}] * 5, {"text": words(200)}]
    name = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError) as caught:
        report(name)
    message = str(caught.value)
    assert message.startswith("8 of 9 rows cannot be used: ")
    assert f"{name}:2: no JSON" in message
    assert f"{name}:3: unknown key 'label'" in message
    assert message.endswith("; and 3 more")
    assert "\n" not in message
    skipped = report(name, on_bad_row="skip")
    assert (skipped.examples, skipped.bad) == (1, 8)
    assert skipped.bad_rows == message and message in str(skipped)
    only_bad = write(tmp_path / "bad.jsonl", ["{"])
    with pytest.raises(ValueError, match="1 of 1 rows cannot be used"):
        report(only_bad, on_bad_row="skip")
    with pytest.raises(ValueError, match=r"no row to train on in .*empty\.jsonl \(0 rows\)"):
        report(write(tmp_path / "empty.jsonl", []))


def test_media_that_cannot_be_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [
        {"text": "a", "images": ["none.png"]},
        {"text": "a", "images": ["broken.png"]},
        {"text": "a", "images": [picture(tmp_path / "a.png")]},
        {"text": "<start_of_image><start_of_image>", "images": ["a.png"]},
        {"text": "a", "audio": ["a.wav"]},
    ]
    name = write(tmp_path / "a.jsonl", rows)
    skipped = report(name, seer_cfg(), on_bad_row="skip")
    assert (skipped.examples, skipped.bad, skipped.items) == (1, 4, {"image": 1})
    for line, reason in {
        1: "none.png",
        2: "broken.png",
        4: "2, images given: 1",
        5: "audio",
    }.items():
        assert f"{name}:{line}: " in skipped.bad_rows and reason in skipped.bad_rows
    blind = report(write(tmp_path / "b.jsonl", [*rows, {"text": "a"}]), on_bad_row="skip")
    assert (blind.examples, blind.bad) == (1, 5)
    assert "this model reads text alone" in blind.bad_rows


@pytest.mark.parametrize(("too_long", "numbers"), [("cut", (3, 2, 0)), ("drop", (1, 0, 2))])
def test_long_rows(tmp_path, too_long, numbers):
    rows = [{"text": words(n)} for n in (3, 200, 300)]
    name = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        ValueError, match=r"2 of 3 rows .*:2: \d+ tokens in rows of 64; cut or drop"
    ):
        report(name)
    found = report(name, too_long=too_long)
    assert (found.examples, found.cut, found.dropped) == numbers
    longest = max(length for _, length in found.longest)
    assert longest == 64 if too_long == "cut" else longest < 64


def test_what_is_cut_off_before_the_answer_is_dropped(tmp_path):
    name = write(tmp_path / "a.jsonl", [chat(words(200), "yes"), chat("Hi", words(200))])
    found = report(name, too_long="cut")
    assert (found.examples, found.cut, found.dropped) == (1, 1, 1)


def test_numbers_of_a_report(tmp_path):
    rows = [{"text": words(n)} for n in (2, 4, 6, 8)]
    name = write(tmp_path / "a.jsonl", rows)
    lengths = [len(tokenizer().encode(row["text"])) + 2 for row in rows]
    found = report(name)
    assert found.tokens == sum(lengths)
    assert found.trained_tokens == sum(lengths) - 4  # all but <bos>
    assert found.padding_unpacked == 1 - sum(lengths) / (4 * 64)
    assert found.padding == 1 - sum(lengths) / (found.rows * 64) < found.padding_unpacked
    assert found.longest[0] == (f"{name}:4", lengths[3])
    assert found.as_dict()["rows"] == found.rows
    assert report(name, packing="off").padding == found.padding_unpacked


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ()}, "files is empty"),
        ({"packing": "worst"}, "packing='worst' must be one of off, in_order"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must lie in"),
        ({"rows": 0}, "rows=0 must be positive"),
        ({"max_images": -1}, "max_images=-1 must not be negative"),
        ({"train_on": "some"}, "train_on='some' must be"),
        ({"tokens_per_row": 1.5}, "tokens_per_row must be an integer"),
    ],
)
def test_settings_that_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(settings("a.jsonl"), **change)


def test_more_images_than_a_row_has_room_for(tmp_path):
    image = picture(tmp_path / "a.png")
    name = write(tmp_path / "a.jsonl", [{"text": "a", "images": [image] * n} for n in (1, 3)])
    with pytest.raises(ValueError, match=":2: 3 items of image, where a row has room for 2"):
        report(name, seer_cfg(), max_images=2)
    assert report(name, seer_cfg()).item_room["image"] >= 3
