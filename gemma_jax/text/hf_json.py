"""Reads `tokenizer.json`, the file of Hugging Face's `tokenizers`.

There BPE is a list of merges, best first; in SentencePiece it is a score per piece, and any two
neighbours whose concatenation is a piece may merge. For a vocabulary that came out of SentencePiece
(transformers' `generate_merges` lists every split of every piece) the two say the same, with the
rank of a piece's first merge as its score.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import repeat

import numpy as np

from .added_tokens import AddedToken
from .vocabulary import BYTE_PIECES, MAX_HOLES, SPACE, Kind, Vocabulary

_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE.decode()}
_FROM_MARK = {"type": "Replace", "pattern": {"String": SPACE.decode()}, "content": " "}
_DECODERS = (_FROM_MARK, {"type": "ByteFallback"}, {"type": "Fuse"})
# Keys of the file and of its model; each is read below, or changes nothing:
# - `truncation`, `padding`: what the last caller chose; transformers sets them anew for every text.
# - `unk_token`, `fuse_unk`: of characters without a piece, which are spelled in bytes here.
_KEYS = frozenset(
    "version truncation padding added_tokens normalizer pre_tokenizer post_processor decoder "
    "model".split()
)
_MODEL_KEYS = frozenset(
    "type dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback "
    "ignore_merges vocab merges".split()
)


def read_tokenizer_json(data: bytes | str) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`.

    Raises:
      ValueError: not JSON, or not a tokenizer that splits text as Gemma's does.
    """
    try:
        root = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a tokenizer.json, got broken JSON: {error}") from None
    if not isinstance(root, dict):
        raise ValueError(f"expected a JSON object, got {type(root).__name__}")
    model = _get(root, "model", dict)
    _check_algorithm(root, model)
    ids = _get(model, "vocab", dict)
    added = [_added_token(token) for token in root.get("added_tokens") or []]
    for i, token in added:
        if ids.get(token.piece, i) != i:
            raise ValueError(
                f"added token {token.content!r} has id {i}, in model.vocab {ids[token.piece]}"
            )
    pieces = _by_id({**ids, **{token.piece: i for i, token in added}})
    ranks = _ranks(_get(model, "merges", list))
    # Pieces of one character have no merge and need no score.
    scores = np.array(list(map(ranks.get, pieces, repeat(0))), np.float32)
    encoded = [piece.encode() for piece in pieces]
    kinds = [Kind.BYTE if piece in BYTE_PIECES else Kind.NORMAL for piece in encoded]
    for i, token in added:
        kinds[i] = Kind.CONTROL if token.special else Kind.USER_DEFINED
    vocabulary = Vocabulary.build(encoded, scores, kinds)
    return replace(vocabulary, added=dict(added), ends=_ends(root.get("post_processor")))


def _check_algorithm(root: dict, model: dict) -> None:
    unknown = [key for key in root if key not in _KEYS]
    unknown += [f"model.{key}" for key in model if key not in _MODEL_KEYS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not known here; it may change how texts are read")
    kind = model.get("type", "BPE")  # files of old versions leave it out
    if kind != "BPE":
        raise ValueError(f"expected model.type 'BPE', got {kind!r}")
    if not model.get("byte_fallback"):
        raise ValueError("expected model.byte_fallback true, as Gemma's tokenizer has it")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise ValueError(f"expected no model.{name}, got {model[name]!r}")
    normalizer = root.get("normalizer")
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        steps = normalizer.get("normalizers")
        normalizer = steps[0] if isinstance(steps, list) and len(steps) == 1 else normalizer
    if normalizer != _TO_MARK:
        raise ValueError(
            f"expected a normalizer that writes ' ' as U+2581, got {normalizer!r:.200}"
        )
    _check_decoder(root.get("decoder"))
    splitter = root.get("pre_tokenizer")
    # Splitting at spaces is what Gemma's file says, and does nothing: none is left by then.
    if splitter is not None and _get(root, "pre_tokenizer", dict).get("pattern") != {"String": " "}:
        raise ValueError(f"expected no pre_tokenizer but a split at ' ', got {splitter!r:.200}")


def _check_decoder(decoder: object) -> None:
    """Pieces become text by U+2581 as ' ', and bytes; a step more would make another text of it."""
    steps = _steps(decoder, "decoders")
    if other := [step for step in steps if step not in _DECODERS]:
        raise ValueError(
            f"expected a decoder that writes U+2581 as ' ' and joins bytes, got {other[0]!r:.200}"
        )


def _ends(processor: object) -> bool:
    """Whether <eos> is put behind a text. In front may be <bos>, which `tokenizer_config.json`
    switches, or nothing (`TemplateProcessing` of `tokenizers` 0.23)."""
    ends = False
    for step in _steps(processor, "processors"):
        parts = step.get("single") if isinstance(step, dict) else None
        if not isinstance(parts, list) or step.get("type") != "TemplateProcessing":
            raise ValueError(f"expected a post_processor that adds <bos>, got {step!r:.200}")
        names = [part.get("SpecialToken", {}).get("id") for part in parts]
        ends = names == ["<bos>", None, "<eos>"]
        if not ends and names not in ([None], ["<bos>", None]):
            raise ValueError(f"expected a post_processor that adds <bos> alone, got {parts!r:.200}")
    return ends


def _steps(value: object, name: str) -> list:
    """The steps of a sequence of them, of one that is none, or of nothing."""
    if isinstance(value, dict) and value.get("type") == "Sequence":
        value = value.get(name)
    return value if isinstance(value, list) else [] if value is None else [value]


def _added_token(entry: object) -> tuple[int, AddedToken]:
    token = AddedToken.read(entry)
    return _get(entry, "id", int), token


def _by_id(ids: dict[str, int]) -> list[str]:
    """Pieces in the order of their ids; "" where no piece has the id."""
    if not ids:
        raise ValueError("expected pieces in model.vocab, got none")
    try:
        low, high = min(ids.values()), max(ids.values())
        if low < 0 or high >= len(ids) + MAX_HOLES:
            raise ValueError(f"expected ids 0..{len(ids) - 1} or few more, got {low}..{high}")
        pieces = [""] * (high + 1)
        for piece, i in ids.items():
            if pieces[i]:
                raise ValueError(f"id {i} is both {pieces[i]!r} and {piece!r}")
            pieces[i] = piece
    except TypeError:
        raise ValueError("expected model.vocab to map pieces to whole numbers") from None
    return pieces


def _ranks(merges: list) -> dict[str, int]:
    """Piece -> minus the index of the first merge that makes it."""
    try:
        if merges and isinstance(merges[0], str):  # "a b", as written before tokenizers 0.20
            made = [merge.replace(" ", "", 1) for merge in merges]
        else:
            made = [left + right for left, right in merges]
    except (AttributeError, TypeError, ValueError):
        raise ValueError("expected model.merges to be pairs of pieces") from None
    # Backwards, so that the first one stays.
    return dict(zip(reversed(made), range(1 - len(made), 1), strict=True))


def _get(table: dict, key: str, kind: type):
    value = table.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"expected {key!r} ({kind.__name__}), got {type(value).__name__}")
    return value
