"""A file that is cut off, altered, or somebody else's ends in a ValueError that names it."""

import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_samples import patient, write_gguf

from gemma_jax.text import Tokenizer, gguf_header


def assert_refused(path, content: bytes, match: str | None = None) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match) as caught:
        Tokenizer.from_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["model", "json", "gguf"])
def test_cut_off(tiny, tmp_path, kind):
    whole = getattr(tiny, kind).read_bytes()
    for size in {0, 1, 3, 4, 10, 23, 24, 25, len(whole) // 3, len(whole) // 2, len(whole) - 9}:
        assert_refused(tmp_path / f"tokenizer.{kind}", whole[:size])


@pytest.mark.parametrize("kind", ["model", "gguf"])
@settings(patient, suppress_health_check=list(HealthCheck), max_examples=60)
@given(data=st.data())
def test_altered_bytes_never_crash(tiny, tmp_path, kind, data):
    content = bytearray(getattr(tiny, kind).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"altered.{kind}"
    path.write_bytes(content)
    try:
        Tokenizer.from_file(path).encode("The quick <bos> brown fox\n\n")
    except ValueError as error:
        assert str(path) in str(error)


def test_other_files(tmp_path):
    assert_refused(
        tmp_path / "model.safetensors", b"\x10\0\0\0\0\0\0\0{}", r"tokenizer\.model, .* GGUF"
    )
    assert_refused(tmp_path / "tokenizer.json", b"[" * 100_000, "JSON")
    assert_refused(tmp_path / "tokenizer.json", b"[]", "expected a JSON object, got list")
    assert_refused(tmp_path / "tokenizer.gguf", b"{}", "begins with 'GGUF'")
    with pytest.raises(FileNotFoundError):
        Tokenizer.from_file(tmp_path / "none.model")


STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}  # Llama 2's decoder has it


def around(*names):
    """A post-processor, as EmbeddingGemma's file has one that adds <eos>."""
    single = [
        {"SpecialToken": {"id": name}} if name else {"Sequence": {"id": "A"}} for name in names
    ]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


CHANGES = [
    (lambda r: r.pop("model"), "'model'"),
    (lambda r: r["model"].update(type="WordPiece"), "'BPE', got 'WordPiece'"),
    (lambda r: r["model"].update(byte_fallback=False), "byte_fallback"),
    (lambda r: r["model"].update(dropout=0.1), "dropout"),
    (lambda r: r["model"].update(ignore_merges=True), "ignore_merges"),
    (lambda r: r["model"].update(merges=None), "'merges' .list., got NoneType"),
    (lambda r: r["model"].update(merges=[["a"]]), "pairs of pieces"),
    (lambda r: r["model"].update(merges=[1, 2]), "pairs of pieces"),
    (lambda r: r["model"].update(vocab={}), "256 byte pieces"),
    (lambda r: r["model"]["vocab"].update(far=1 << 60), "few more"),
    (lambda r: r["model"]["vocab"].update(twice=5), "id 5 is both"),
    (lambda r: r["model"]["vocab"].update(half=0.5), "whole numbers"),
    (lambda r: r["model"]["vocab"].pop("<0x0A>"), "256 byte pieces"),
    (lambda r: r.update(normalizer=None), "normalizer"),
    (lambda r: r.update(normalizer={"type": "NFC"}), "normalizer"),
    (lambda r: r.update(pre_tokenizer={"type": "ByteLevel"}), "pre_tokenizer"),
    (lambda r: r.update(pre_tokenizer=3), "pre_tokenizer"),
    (lambda r: r.update(vocabulary={}), "vocabulary: not known here"),
    (lambda r: r["model"].update(lowercase=True), "model.lowercase: not known here"),
    (lambda r: r["decoder"]["decoders"].append(STRIP), "got .'type': 'Strip'"),
    (lambda r: r.update(decoder={"type": "Metaspace"}), "decoder"),
    (lambda r: r.update(post_processor={"type": "ByteLevel"}), "post_processor"),
    (lambda r: r.update(post_processor=around("<bos>", None, "<eos>")), "adds <bos> alone"),
    (lambda r: r.update(post_processor=around("<pad>", None)), "adds <bos> alone"),
    (lambda r: r.update(added_tokens=[3]), "object per added token"),
    (lambda r: r["added_tokens"][0].update(lstrip="yes"), "lstrip"),
    (lambda r: r["added_tokens"][0].update(id=77), "in model.vocab 0"),
]


@pytest.mark.parametrize(("change", "match"), CHANGES)
def test_json_of_another_tokenizer(tiny, tmp_path, change, match):
    root = json.loads(tiny.json.read_text(encoding="utf-8"))
    change(root)
    assert_refused(tmp_path / "tokenizer.json", json.dumps(root).encode(), match)


def test_what_published_files_put_around_a_text(tiny):
    root = json.loads(tiny.json.read_text(encoding="utf-8"))
    for processor in (None, around(None), around("<bos>", None)):
        root["post_processor"] = processor
        assert Tokenizer.from_hf_json(json.dumps(root)).add_bos


def test_gguf_of_another_tokenizer(tiny, tmp_path):
    for change, match in [
        ({"model": "gpt2"}, "'llama'.*gpt2"),
        ({"space_prefix": True}, "add_space_prefix"),
    ]:
        write_gguf(tmp_path / "other.gguf", *tiny.table, **change)
        assert_refused(tmp_path / "other.gguf", (tmp_path / "other.gguf").read_bytes(), match)


def test_gguf_with_lying_lengths(tmp_path):
    """No list or string is begun that the file cannot hold."""
    start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    huge = 1 << 62
    for value in [
        struct.pack("<IQ", 8, huge),
        struct.pack("<IIQ", 9, 8, huge),
        struct.pack("<IIQQ", 9, 8, 1, huge),
        struct.pack("<IIQ", 9, 4, huge),
        struct.pack("<IIQ", 9, 9, 1),
        struct.pack("<I", 99),
    ]:
        assert_refused(tmp_path / "lying.gguf", start + value + bytes(16), "broken GGUF header")
    assert_refused(
        tmp_path / "lying.gguf", b"GGUF" + struct.pack(">IQQ", 3, 0, 1), "version 2 or 3"
    )
    assert_refused(tmp_path / "lying.gguf", b"GGUF" + struct.pack("<IQQ", 3, 0, huge), "broken")


def test_gguf_header_is_what_the_gguf_package_reads(tiny):
    gguf = pytest.importorskip("gguf")
    theirs = gguf.GGUFReader(tiny.gguf).fields
    ours = gguf_header.read_header(tiny.gguf)
    assert ours.keys() == {key for key in theirs if not key.startswith("GGUF.")}
    assert [p.decode() for p in ours["tokenizer.ggml.tokens"]] == theirs[
        "tokenizer.ggml.tokens"
    ].contents()
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        assert ours[key].tolist() == theirs[key].contents()
