"""What a Gemma vocabulary is, whichever file it came from.

A vocabulary is a table: row `i` is piece `i` with its merge score and its kind. The readers
(`sentencepiece_proto.read_model`, `hf_json.read_tokenizer_json`, `gguf_header.read_vocabulary`)
all produce this table, `sentencepiece_proto.write_model` turns it into the one engine that encodes.
So three file formats cannot disagree anywhere but in their readers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np

from .added_tokens import AddedToken

SPACE = "\u2581".encode()  # how pieces spell a space (SentencePiece's "lower one eighth block")


class Kind(IntEnum):
    """`ModelProto.SentencePiece.Type`; GGUF's `token_type` has the same numbers."""

    NORMAL = 1  # made by merges
    UNKNOWN = 2  # what a character without any piece becomes; exactly one
    CONTROL = 3  # never made by merges; `Tokenizer` looks for these in the text when asked to
    USER_DEFINED = 4  # found in the text before any merge, longest first
    UNUSED = 5
    BYTE = 6  # "<0x00>" ... "<0xFF>"


# The pieces that structure a prompt. A text can be encoded with these as plain text, and decoding
# can leave them out. Files disagree about which these are (SentencePiece knows the turn markers as
# user-defined, llama.cpp marks every "<unused12>" as control), hence the list: the ones that
# Hugging Face's tokenizers flag as special.
SPECIAL = frozenset(
    b"<pad> <eos> <bos> <unk> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> "
    b"<image_soft_token> <start_of_audio> <end_of_audio> <audio_soft_token>".split()
)

# Placeholders beyond the 262,144 trained pieces: every `tokenizer.json` lists them, no
# `tokenizer.model` or GGUF does. The key is piece 256000, which tells Gemma 3 from Gemma 3n; the
# ids are those of `Gemma3Config` and `Gemma3nConfig` (transformers).
_TRAINED_PIECES, _MARK = 262_144, 256_000
_PLACEHOLDERS = {
    b"<end_of_image>": {262_144: b"<image_soft_token>"},
    b"<start_of_audio>": {
        262_144: b"<end_of_image>",
        262_145: b"<image_soft_token>",
        262_272: b"<end_of_audio>",
        262_273: b"<audio_soft_token>",
    },
}

MAX_HOLES = 4096  # Gemma 3n leaves 126 ids free between its image and its audio placeholders

BYTE_PIECES = {b"<0x%02X>" % byte: bytes([byte]) for byte in range(256)}


@dataclass(frozen=True)
class Vocabulary:
    """Pieces by id.

    Attributes:
      pieces: UTF-8, spaces spelled U+2581; `b""` is a hole, an id that stands for nothing.
      scores: float32 [len(pieces)]; of two possible merges the one whose result scores higher wins.
      kinds: `Kind` values, one byte per piece.
      added: Id -> token with flags, for the pieces that a file lists with theirs.
      ends: Whether the file puts <eos> behind a text.
    """

    pieces: list[bytes]
    scores: np.ndarray
    kinds: bytes
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    ends: bool = False

    def __post_init__(self):
        sizes = len(self.pieces), len(self.scores), len(self.kinds)
        if len(set(sizes)) != 1:
            raise ValueError(f"expected as many pieces as scores and kinds, got {sizes}")
        if not np.isfinite(self.scores).all():
            raise ValueError("expected finite scores only")
        try:
            b"\n".join(self.pieces).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"expected pieces in UTF-8: {error}") from None

    @classmethod
    def build(cls, pieces: list[bytes], scores: np.ndarray, kinds: Sequence[int]) -> Vocabulary:
        """The table as every file should have written it: specials marked, placeholders added.

        Raises:
          ValueError: a kind that does not exist or does not fit its piece, not exactly one <unk>.
        """
        if not set(kinds) <= set(Kind):
            raise ValueError(f"expected kinds of 1..6, got {sorted(set(kinds) - set(Kind))}")
        kinds = bytearray(kinds)
        if len(pieces) == _TRAINED_PIECES:
            pieces, scores, kinds = _with_placeholders(pieces, scores, kinds)
        for i in (i for i, piece in enumerate(pieces) if not piece):
            kinds[i] = Kind.CONTROL
        for name in SPECIAL.intersection(pieces):
            kinds[pieces.index(name)] = Kind.UNKNOWN if name == b"<unk>" else Kind.CONTROL
        vocab = cls(pieces, np.asarray(scores, np.float32), bytes(kinds))
        if (count := kinds.count(Kind.UNKNOWN)) != 1:
            raise ValueError(f"expected one piece <unk>, got {count} of kind UNKNOWN")
        if strangers := set(vocab.of_kind(Kind.BYTE).values()) - BYTE_PIECES.keys():
            raise ValueError(f"expected byte pieces '<0x00>' ... '<0xFF>', got {min(strangers)!r}")
        return vocab

    def with_added(self, tokens: Mapping[int, AddedToken]) -> Vocabulary:
        """The vocabulary with tokens that were added to it later, or renamed.

        Raises:
          ValueError: An id far beyond the vocabulary, or one that a learned piece has; a token that
            is a piece of another id.
        """
        if not tokens:
            return self
        high = max(tokens)
        if min(tokens) < 0 or high >= len(self.pieces) + len(tokens) + MAX_HOLES:
            raise ValueError(f"expected ids of added tokens near {len(self.pieces)}, got {high}")
        more = max(high + 1 - len(self.pieces), 0)
        pieces, kinds = self.pieces + [b""] * more, bytearray(self.kinds) + bytes([3]) * more
        ids = {piece: i for i, piece in enumerate(pieces)}
        for i, token in tokens.items():
            piece, old = token.piece.encode(), pieces[i]
            if ids.get(piece, i) != i:
                raise ValueError(
                    f"added token {token.content!r} has id {i}, in the vocabulary {ids[piece]}"
                )
            if old and old != piece and kinds[i] in (Kind.NORMAL, Kind.BYTE, Kind.UNKNOWN):
                raise ValueError(
                    f"id {i} is {old.decode()!r} in the vocabulary, {token.content!r} among the "
                    "added tokens"
                )
            pieces[i] = piece
            if kinds[i] != Kind.UNKNOWN:
                special = token.special or piece in SPECIAL
                kinds[i] = Kind.CONTROL if special else Kind.USER_DEFINED
        scores = np.concatenate([self.scores, np.zeros(more, np.float32)])
        return replace(
            self, pieces=pieces, scores=scores, kinds=bytes(kinds), added={**self.added, **tokens}
        )

    def with_specials(self, names: Sequence[str]) -> Vocabulary:
        """The vocabulary with these pieces as special ones, unless it lists them as other ones.

        Raises:
          ValueError: A name that is no piece.
        """
        kinds = bytearray(self.kinds)
        for i in map(self.id_of, names):
            if kinds[i] != Kind.UNKNOWN and i not in self.added:
                kinds[i] = Kind.CONTROL
        return self if kinds == self.kinds else replace(self, kinds=bytes(kinds))

    def id_of(self, name: str) -> int:
        """The id of a piece that a file names; ValueError if there is none."""
        piece = name.replace(" ", SPACE.decode()).encode()
        if piece not in self.pieces:
            raise ValueError(f"the special token {name!r} has no piece in the vocabulary")
        return self.pieces.index(piece)

    def tokens(self) -> dict[int, AddedToken]:
        """Id -> token of all pieces that are looked for in a text before any merge."""
        found = self.of_kind(Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
        return {
            i: replace(
                self.added.get(i) or AddedToken(piece.decode()),
                special=self.kinds[i] != Kind.USER_DEFINED,
            )
            for i, piece in found.items()
        }

    def hiding(self, ids: Iterable[int]) -> Vocabulary:
        """The vocabulary for an engine that is not to find these pieces by itself.

        It may still make them by merges, if there are any: those have a score.
        """
        kinds = bytearray(self.kinds)
        for i in ids:
            if kinds[i] == Kind.USER_DEFINED:
                kinds[i] = Kind.NORMAL if self.scores[i] else Kind.CONTROL
        return replace(self, kinds=bytes(kinds))

    def of_kind(self, *kinds: Kind) -> dict[int, bytes]:
        """Id -> piece of the pieces of these kinds, holes left out."""
        ids = np.flatnonzero(np.isin(np.frombuffer(self.kinds, np.uint8), kinds)).tolist()
        return {i: self.pieces[i] for i in ids if self.pieces[i]}

    def specials(self) -> dict[str, int]:
        """Name -> id of the pieces that `parse_special` and `skip_special` speak of."""
        return {p.decode(): i for i, p in self.of_kind(Kind.CONTROL, Kind.UNKNOWN).items()}

    def texts(self) -> list[bytes]:
        """What each piece contributes to a decoded text: real spaces, real bytes."""
        # As one string, for speed; 0xFF is in no UTF-8 text.
        texts = b"\xff".join(self.pieces).replace(SPACE, b" ").split(b"\xff")
        for i, piece in self.of_kind(Kind.BYTE).items():
            texts[i] = BYTE_PIECES[piece]
        return texts


def _with_placeholders(pieces, scores, kinds):
    extra = _PLACEHOLDERS.get(pieces[_MARK], {})
    count = max(extra, default=_TRAINED_PIECES - 1) + 1 - _TRAINED_PIECES
    added = [extra.get(_TRAINED_PIECES + i, b"") for i in range(count)]
    scores = np.concatenate([scores, np.zeros(count, np.float32)])
    return pieces + added, scores, kinds + bytes([Kind.CONTROL]) * count
