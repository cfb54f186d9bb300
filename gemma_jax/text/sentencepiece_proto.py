"""Reads and writes SentencePiece's `ModelProto`, the protobuf message inside `tokenizer.model`.

Only the fields that decide how Gemma splits text are known here; the schema is
`sentencepiece_model.proto` of google/sentencepiece. Written by hand because a protobuf runtime is
a heavy dependency for six fields. A message is a run of (tag, value); the tag is
`field << 3 | wire`, with wire 0 a varint, 2 a length and that many bytes, 5 four bytes.
"""

from __future__ import annotations

import numpy as np

from .vocabulary import Kind, Vocabulary

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35  # fields of TrainerSpec
_IDS, _NAMES = range(40, 44), range(45, 49)  # unk, bos, eos, pad
_CHARSMAP, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPE = 2, 3, 4, 5  # fields of NormalizerSpec
_MODEL_TYPES = {1: "UNIGRAM", 2: "BPE", 3: "WORD", 4: "CHAR"}
_BPE = 2


# --- reading -------------------------------------------------------------------------------------


def read_model(data: bytes) -> Vocabulary:
    """The vocabulary of a serialized model.

    Raises:
      ValueError: the bytes are no ModelProto, or one that splits text in another way than Gemma's.
    """
    rows, specs = [], {_TRAINER: b"", _NORMALIZER: b""}
    for field, value in _fields(data):
        if field == _PIECES and isinstance(value, bytes):
            rows.append(_piece(value))
        elif field in specs and isinstance(value, bytes):
            specs[field] = value
        elif field in (_PIECES, *specs):
            raise ValueError(f"field {field} of a SentencePiece model must be a message")
    if not rows:
        raise ValueError("expected a SentencePiece model with pieces, got none")
    _check_spec(dict(_fields(specs[_TRAINER])), dict(_fields(specs[_NORMALIZER])))
    pieces, scores, kinds = map(list, zip(*rows, strict=True))
    if b"" in pieces:
        raise ValueError(f"expected a text in every piece, got none in piece {pieces.index(b'')}")
    return Vocabulary.build(pieces, np.frombuffer(b"".join(scores), "<f4"), kinds)


def _piece(message: bytes) -> tuple[bytes, bytes, int]:
    """(piece, float32 score as stored, kind) of one SentencePiece message."""
    size = len(message)
    end = 2 + message[1] if size > 1 else 0
    # Every writer puts the fields in order, and most pieces are short: 262,144 times this branch.
    if message[0:1] == b"\n" and end < 130 and message[end : end + 1] == b"\x15":
        if size == end + 5:
            return message[2:end], message[end + 1 :], Kind.NORMAL
        if size == end + 7 and message[end + 5] == 0x18:
            return message[2:end], message[end + 1 : end + 5], message[end + 6]
    fields = dict(_fields(message))
    piece, score, kind = fields.get(1, b""), fields.get(2, bytes(4)), fields.get(3, Kind.NORMAL)
    if not (isinstance(piece, bytes) and isinstance(score, bytes) and len(score) == 4):
        raise ValueError("a piece needs a text and a float32 score, got other field types")
    return piece, score, kind


def _check_spec(trainer: dict, normalizer: dict) -> None:
    model_type = trainer.get(_MODEL_TYPE, 1)
    if model_type != _BPE:
        name = _MODEL_TYPES.get(model_type, model_type)
        raise ValueError(f"expected a BPE model, as Gemma's is, got {name}")
    if not trainer.get(_BYTE_FALLBACK, 0):
        raise ValueError("expected a model with byte_fallback, as Gemma's is")
    if normalizer.get(_CHARSMAP) or not normalizer.get(_ESCAPE, 1):
        raise ValueError("expected the 'identity' normalizer: Gemma's text is never rewritten")
    for field, name in (_DUMMY_PREFIX, "add_dummy_prefix"), (_EXTRA_SPACES, "remove_extra_spaces"):
        if normalizer.get(field, 1):
            raise ValueError(f"expected {name}=false: Gemma neither adds nor drops spaces")


def _fields(data: bytes):
    """Yields (field number, int or bytes) of one message; ValueError if it is malformed."""
    pos, size = 0, len(data)
    while pos < size:
        tag, pos = _varint(data, pos)
        wire = tag & 7
        if wire == _VARINT:
            value, pos = _varint(data, pos)
        elif wire in (_BYTES, _FIXED32, _FIXED64):
            length, pos = _varint(data, pos) if wire == _BYTES else (_FIXED[wire], pos)
            if length > size - pos:
                raise ValueError(
                    f"truncated model: {length} bytes expected at {pos}, got {size - pos}"
                )
            value, pos = data[pos : pos + length], pos + length
        else:
            raise ValueError(f"expected a SentencePiece model, got wire type {wire} at byte {pos}")
        yield tag >> 3, value


def _varint(data: bytes, pos: int) -> tuple[int, int]:
    if pos < len(data) and data[pos] < 128:  # nearly always
        return data[pos], pos + 1
    value = shift = 0
    while shift < 64:
        if pos >= len(data):
            raise ValueError(f"truncated model: a number is cut off at byte {pos}")
        byte = data[pos]
        pos += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, pos
        shift += 7
    raise ValueError(f"expected a SentencePiece model, got a number of over 64 bits at {pos}")


# --- writing -------------------------------------------------------------------------------------


def write_model(vocab: Vocabulary) -> bytes:
    """A serialized ModelProto with these pieces that splits text as Gemma does."""
    rows = zip(vocab.pieces, vocab.scores.astype("<f4").view("V4").tolist(), vocab.kinds)
    pieces = [
        # Both lengths fit one byte for all but a handful of pieces; formatting is then fastest.
        b"\n%c\n%c%b\x15%b\x18%c" % (len(piece) + 9, len(piece), piece, score, kind)
        if 0 < len(piece) < 119
        else _message(
            _PIECES, _entry(1, piece or b"<hole_%d>" % i), b"\x15", score, _entry(3, kind)
        )
        for i, (piece, score, kind) in enumerate(rows)
    ]
    trainer = [_entry(_MODEL_TYPE, _BPE), _entry(_BYTE_FALLBACK, 1)]
    names = [b"<unk>", b"<bos>", b"<eos>", b"<pad>"]
    trainer += [_entry(f, vocab.pieces.index(n)) for f, n in zip(_IDS, names, strict=True)]
    trainer += [_entry(f, n) for f, n in zip(_NAMES, names, strict=True)]
    normalizer = [_entry(1, b"identity"), _entry(_DUMMY_PREFIX, 0), _entry(_EXTRA_SPACES, 0)]
    normalizer.append(_entry(_ESCAPE, 1))
    return b"".join(
        [*pieces, _message(_TRAINER, *trainer), _message(_NORMALIZER, *normalizer)],
    )


def _message(field: int, *entries: bytes) -> bytes:
    return _entry(field, b"".join(entries))


def _entry(field: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _number(field << 3 | _BYTES) + _number(len(value)) + value
    return _number(field << 3 | _VARINT) + _number(value)


def _number(value: int) -> bytes:
    """A varint: seven bits a byte, lowest first, the top bit set on all but the last."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes(out) + bytes([value])
