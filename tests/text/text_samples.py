"""What the tests of this room share besides fixtures: texts, settings, writers of tokenizer files.

Not in `conftest.py`, since that name means another file in another room.
"""

import json
import string
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from gemma_jax.text.vocabulary import SPECIAL, Kind

DATA = Path(__file__).parent / "data"

# For property tests: how long an example takes says how busy the machine is.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

# What a tokenizer may trip over, to be strung together at random.
SNIPPETS = [
    *"abcxyz019.,!?<>/'\"_-=(){}[]\r\0",
    *(
        "the",
        " the",
        "The quick",
        "return x ** 2",
        "user",
        "model",
        "ing",
        "ation",
        "http",
        "</",
        ">",
    ),
    *(" " * n for n in (1, 2, 3, 16, 31, 32, 33, 63)),
    *("\n" * n for n in (1, 2, 30, 31, 32, 40)),
    *("\t" * n for n in (1, 2, 31, 32)),
    *("\u2581", "\u2581\u2581", "\u00a0", "\u200b", "\u200d", "\ufeff", "\u0301", "\x85"),
    *(
        "ä",
        "日本語",
        "السلام",
        "👩\u200d👩\u200d👧",
        "🏽",
        "\U0001d539",
        "\ufffd",
        "\U0010ffff",
    ),
    *("<bos>", "<eos>", "<pad>", "<unk>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"),
    *("<image_soft_token>", "<unused5>", "<mask>", "[multimodal]", "<table>", "</div>", "<0x0A>"),
]
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(SNIPPETS), max_size=12).map("".join),
    st.text(string.printable, max_size=40),
)


def hf_tokenizer_json(pieces: list[str], scores: list[float], kinds: list[int]) -> str:
    """A `tokenizer.json` as transformers' converter makes it out of a SentencePiece model: every
    split of every piece is a merge, the best piece first, then the longest left half."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, score in zip(pieces, scores, strict=True):
        splits = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        merges += [(-score, -len(a), -len(b), a, b) for a, b in splits if a in ids and b in ids]
    merges.sort(key=lambda merge: merge[:3])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": i, "content": piece, "special": piece.encode() in SPECIAL, **flags}
        for piece, i in ids.items()
        if kinds[i] not in (Kind.NORMAL, Kind.BYTE)
    ]
    mark = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": ids,
        "merges": [merge[3:] for merge in merges],
    }
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    root = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": mark,
        "pre_tokenizer": split | {"invert": False},
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": model,
    }
    return json.dumps(root, ensure_ascii=False)


def write_gguf(path: Path, pieces, scores, kinds, *, model="llama", space_prefix=False) -> None:
    """A GGUF with this vocabulary and no tensors, as llama.cpp's converter spells it: runs of
    spaces in spaces, every reserved piece a control piece, -1000 for what no merge makes."""
    gguf = pytest.importorskip("gguf", reason="writes the GGUF files of the tests")
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_tokenizer_model(model)
    spaced = [p.replace("\u2581", " ") if k == 4 else p for p, k in zip(pieces, kinds, strict=True)]
    writer.add_token_list(spaced)
    made = (Kind.NORMAL, Kind.BYTE)
    writer.add_token_scores(
        [s if k in made else -1000.0 for s, k in zip(scores, kinds, strict=True)]
    )
    reserved = ("<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>", "<unk>")
    types = [Kind.CONTROL if p in reserved else k for p, k in zip(pieces, kinds, strict=True)]
    writer.add_token_types([int(kind) for kind in types])
    writer.add_add_space_prefix(space_prefix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
