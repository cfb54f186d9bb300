"""Streams say what the whole text says, however it is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_samples import TEXTS, patient

from gemma_jax.text import StopText, StreamDecoder


@patient
@given(data=st.data(), skip_special=st.booleans())
def test_stream_decoder_adds_up_to_decode(tokenizer, data, skip_special):
    first = tokenizer.id_of("<0x00>")
    byte = st.integers(first + 0x7F, first + 0xFF)  # mostly broken characters
    ids = st.lists(st.one_of(byte, st.integers(0, tokenizer.vocab_size - 1)), max_size=20)
    ids = data.draw(st.one_of(ids, TEXTS.map(tokenizer.encode)))
    stream, parts, start = StreamDecoder(tokenizer, skip_special=skip_special), [], 0
    while start < len(ids):
        stop = start + data.draw(st.integers(1, 3))
        parts.append(stream.push(ids[start:stop]))
        start = stop
    parts.append(stream.flush())
    assert "".join(parts) == tokenizer.decode(ids, skip_special=skip_special)


def test_characters_come_whole(tokenizer):
    ids = tokenizer.encode("🏽")
    assert len(ids) == 4
    stream = StreamDecoder(tokenizer)
    assert [stream.push([i]) for i in ids] == ["", "", "", "🏽"]
    assert stream.push(ids[:2]) == "" and stream.flush() == "\ufffd\ufffd"
    assert stream.push(ids) == "🏽" and stream.flush() == ""


def first_match(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The definition: read on until some stop text is complete."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@patient
@given(data=st.data())
def test_stop_text_is_found_however_the_text_is_cut(data):
    letters = st.text("ab", min_size=1, max_size=4)  # few letters, many near matches
    stops = data.draw(st.lists(letters, max_size=3))
    parts = data.draw(st.lists(st.text("abc", max_size=5), max_size=8))
    stop = StopText(stops)
    shown = ""
    for i, part in enumerate(parts):
        shown += stop.push(part)
        # Nothing is held back longer than it may still matter.
        seen = "".join(parts[: i + 1])
        if stop.matched is None and not any(seen.endswith(s[:1]) for s in stops if s):
            held = len(seen) - len(shown)
            assert held < max(map(len, stops), default=1)
    shown += stop.flush()
    assert (shown, stop.matched) == first_match("".join(parts), stops)


def test_stop_text_by_hand():
    stop = StopText(["\nUser:", "END"])
    assert [stop.push(part) for part in ("Hi", "\n", "Us", "a\nUse", "r: no", "END")] == [
        *("Hi", "", "", "\nUsa", "", "")
    ]
    assert stop.matched == "\nUser:" and stop.flush() == ""
    assert StopText([]).push("anything") == "anything"
    for bad in ("END", [""], [3]):
        with pytest.raises(ValueError, match="non-empty stop texts"):
            StopText(bad)
