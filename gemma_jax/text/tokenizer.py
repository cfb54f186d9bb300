"""Text to token ids and back, the same for every file that holds a Gemma vocabulary."""

from __future__ import annotations

import codecs
import contextlib
import copy
import gc
import operator
import os
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from . import gguf_header, hf_json, sentencepiece_proto
from .added_tokens import Finder
from .chat_template import ChatTemplate
from .gguf_config import read_gguf_config
from .tokenizer_config import TokenizerConfig, read_tokenizer_config
from .vocabulary import SPACE, Kind, Vocabulary

_MAX_ID = 2**31 - 1  # ids are int32
_MAX_FILE = 1 << 28  # the largest tokenizer.json of the family has 33 MB
_FOLDER_FILES = "tokenizer.json", "tokenizer.model"  # the first one also names the placeholders

# Bytes that are no UTF-8 become one U+FFFD each, as in SentencePiece; Python's "replace" would make
# one of a whole cut-off character. The codecs registry is how Python takes such a rule, and the one
# that `StreamDecoder` can share.
UTF8_ERRORS = "gemma_jax.one_mark_per_byte"
codecs.register_error(UTF8_ERRORS, lambda error: ("\ufffd" * (error.end - error.start), error.end))


# Pieces that files may list as text, and that no text is meant to hold.
_RESERVED = frozenset((b"<unused>", b"<mask>", b"[multimodal]"))


class Tokenizer:
    """Turns text into token ids and back, with a Gemma vocabulary. Immutable; threads may share it.

    Spaces are spelled U+2581 in pieces, no space is added in front, nothing is normalised, and what
    has no piece is spelled in bytes. So `decode(encode(text)) == text`, but for a U+2581 in `text`,
    which comes back as a space.

    Attributes:
      vocab_size: one more than the largest id. May exceed the rows of a text-only model's
        embedding: the placeholders of images and audio come last.
      bos_id, eos_id, pad_id, unk_id: the four ids every Gemma vocabulary has.
      stop_ids: ids that end an answer: <eos> and, where it exists, <end_of_turn>; or what the
        checkpoint says.
      stop_ids_from: who says so.
      add_bos: whether a prompt of plain text begins with <bos>.
      add_eos: whether a text ends with <eos>, as those that are embedded do.
      chat_template: the checkpoint's own; `None` for Gemma 3's format.
      path: the file that it was read from, if it was one.
      special_ids: name -> id of every piece that `parse_special` and `skip_special` are about.

    Examples:
      >>> import gemma_jax as gj
      >>> tok = gj.load_tokenizer("checkpoints/digits")
      >>> ids = tok.encode("Which digit is left?", bos=True)
      >>> tok.pieces(ids)
      ['<bos>', 'Which', '▁digit', '▁is', '▁left', '?']
      >>> tok.decode(ids, skip_special=True)
      'Which digit is left?'
    """

    def __init__(self, vocabulary: Vocabulary, config: TokenizerConfig = TokenizerConfig()):
        """Raises ValueError if this is no Gemma vocabulary, or not a usable one."""
        vocabulary = vocabulary.with_added(config.added).with_specials(config.specials)
        self.special_ids = vocabulary.specials()
        missing = {"<bos>", "<eos>", "<pad>", "<unk>"} - self.special_ids.keys()
        if missing:
            raise ValueError(f"expected a Gemma vocabulary, got one without {sorted(missing)}")
        self._finder = None
        if not all(token.plain for token in vocabulary.added.values()):
            self._finder = Finder(vocabulary.tokens())
            vocabulary = vocabulary.hiding(i for i, t in vocabulary.added.items() if not t.plain)
        model = sentencepiece_proto.write_model(vocabulary)
        try:
            self._engine = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"SentencePiece refuses the vocabulary: {error}") from None
        self._pieces = vocabulary.pieces
        self._texts = vocabulary.texts()
        # Hugging Face's tokenizers look for added pieces before spaces become U+2581, so a literal
        # run of U+2581 does not join the spaces beside it. SentencePiece alone would let it.
        marks = [p.decode() for p in vocabulary.of_kind(Kind.USER_DEFINED).values() if SPACE in p]
        names = sorted([*self.special_ids, *marks], key=len, reverse=True)  # the longest wins
        self._special = re.compile("(" + "|".join(map(re.escape, names)) + ")")
        self._skipped = frozenset(self.special_ids.values())
        self.vocab_size = len(self._pieces)
        self.bos_id = vocabulary.id_of(config.bos_token or "<bos>")
        self.eos_id = vocabulary.id_of(config.eos_token or "<eos>")
        self.pad_id, self.unk_id = self.special_ids["<pad>"], self.special_ids["<unk>"]
        named = [self.special_ids.get(name, self.eos_id) for name in ("<eos>", "<end_of_turn>")]
        self.stop_ids: tuple[int, ...] = tuple(sorted({self.eos_id, *named}))
        self.stop_ids_from = "the tokenizer"
        self.add_bos = config.add_bos
        self.add_eos = vocabulary.ends if config.add_eos is None else config.add_eos
        self.chat_template: ChatTemplate | None = config.chat_template
        self.path: Path | None = None

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, stop_ids={self.stop_ids})"

    def __call__(self, *args, **options):
        """Says how text is encoded, as a hint to those who call a tokenizer."""
        raise TypeError("a text is encoded by tok.encode(text, bos=True)")

    def with_stop_ids(self, stop_ids: Iterable[int], source: str) -> Tokenizer:
        """The same tokenizer, with other ids that end an answer; `source` says so."""
        other = copy.copy(self)
        other.stop_ids, other.stop_ids_from = tuple(sorted(set(stop_ids))), source
        return other

    # --- where it comes from ---------------------------------------------------------------------

    @classmethod
    def from_file(
        cls, path: str | os.PathLike, config: TokenizerConfig = TokenizerConfig()
    ) -> Tokenizer:
        """From a `tokenizer.model`, a `tokenizer.json` or a `.gguf` (only its header is read).

        `config` is what files beside it say; a GGUF file says all itself.

        Raises:
          OSError: the file cannot be read.
          ValueError: it is none of the three, broken, or not Gemma's; the message names the file.
        """
        path = Path(path)
        with open(path, "rb") as file:
            head = file.read(4)
        if head == gguf_header.MAGIC or path.suffix == ".gguf":
            make, content = _from_gguf, gguf_header.read_header(path)
        elif path.suffix == ".json" or head[:1] == b"{":
            make, content = _from_hf_json, _read(path)
        elif path.suffix == ".model" or head[:1] == b"\n":  # the tag of a ModelProto's first piece
            make, content = _from_sentencepiece, _read(path)
        else:
            raise ValueError(
                f"{path}: expected a SentencePiece tokenizer.model, a tokenizer.json or a GGUF file"
            )
        try:
            with _collector_paused():
                tokenizer = make(content, config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        tokenizer.path = path
        return tokenizer

    @classmethod
    def from_folder(cls, path: str | os.PathLike) -> Tokenizer:
        """From a Hugging Face folder: its `tokenizer.json`, else its `tokenizer.model`.

        The files beside it are read as well, see `tokenizer_config`.
        """
        for name in _FOLDER_FILES:
            if (Path(path) / name).is_file():
                return cls.from_file(Path(path) / name, read_tokenizer_config(Path(path)))
        raise FileNotFoundError(f"{os.fspath(path)}: expected {' or '.join(_FOLDER_FILES)} in it")

    @classmethod
    def from_sentencepiece_bytes(cls, data: bytes) -> Tokenizer:
        """From the content of a `tokenizer.model`."""
        return _from_sentencepiece(data)

    @classmethod
    def from_hf_json(cls, data: bytes | str) -> Tokenizer:
        """From the content of a `tokenizer.json`."""
        return _from_hf_json(data)

    @classmethod
    def from_gguf_header(cls, header: dict[str, object]) -> Tokenizer:
        """From what `gguf_header.read_header` returned for a GGUF file."""
        return _from_gguf(header)

    def to_sentencepiece_bytes(self) -> bytes:
        """The content of a `tokenizer.model` with this vocabulary.

        Raises:
          ValueError: tokens whose flags (`lstrip` and the like) no such file can say.
        """
        if self._finder is not None:
            raise ValueError("a tokenizer.model cannot say the flags of added tokens")
        return self._engine.serialized_model_proto()

    # --- what it does ----------------------------------------------------------------------------

    def encode(self, text: str, *, bos: bool = False, parse_special: bool = True) -> list[int]:
        """Ids of a text.

        Args:
          text: any text that has a UTF-8 form.
          bos: begin with <bos>; a text that already does keeps its one.
          parse_special: read "<start_of_turn>" and its like as the one piece they name, as Hugging
            Face's tokenizers do. False takes them for what a user typed.

        Raises:
          ValueError: a lone surrogate in `text`.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"expected text that has a UTF-8 form, got a lone surrogate {text[error.start]!r} "
                f"at index {error.start}; decode the bytes it came from with errors='replace'"
            ) from None
        ids = (
            self._found(text, parse_special) if self._finder else self._encode(text, parse_special)
        )
        if bos and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def _found(self, text: str, parse_special: bool) -> list[int]:
        ids = []
        for part in self._finder.split(text, special=parse_special):
            ids += [part] if isinstance(part, int) else self._engine.encode(part)
        return ids

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        ids = []
        # The pattern is one group, so what it matched is every second part.
        for i, part in enumerate(self._special.split(text) if parse_special else [text]):
            if i % 2 and part in self.special_ids:
                ids.append(self.special_ids[part])
            elif part:
                ids += self._engine.encode(part)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; a byte that is part of no character becomes U+FFFD.

        An id without a piece is no text: embeddings are padded to more rows than there are pieces,
        and a model may choose any of them (transformers 5.24 decodes them alike).

        Raises:
          ValueError: a negative id, or one that no 32-bit embedding could have.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", UTF8_ERRORS)

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """As `decode`, before the bytes are read as UTF-8: this one is a plain concatenation."""
        ids = self._checked(ids)
        if skip_special:
            ids = [i for i in ids if i not in self._skipped]
        return b"".join([self._texts[i] for i in ids if i < self.vocab_size])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The piece of each id as the vocabulary spells it: "▁the", "<0x0D>", "<bos>"; or ""."""
        ids = self._checked(ids)
        return [self._pieces[i].decode() if i < self.vocab_size else "" for i in ids]

    def texts(self) -> list[bytes]:
        """What each id is as text; `b""` where it is none: special and unused ids, and holes."""
        ids = range(self.vocab_size)
        none = self._engine.is_unused(list(ids))
        return [
            b"" if i in self._skipped or none[i] or piece in _RESERVED else text
            for i, piece, text in zip(ids, map(_unnumbered, self._pieces), self._texts)
        ]

    def id_of(self, piece: str) -> int:
        """The id of a piece, spelled as `pieces` spells it; ValueError if there is none."""
        found = self._engine.piece_to_id(piece)
        if self._pieces[found] != piece.encode():
            raise ValueError(f"the vocabulary has no piece {piece!r}")
        return found

    def _checked(self, ids: Iterable[int]) -> list[int]:
        ids = [operator.index(i) for i in ids]
        for i in ids:
            if not 0 <= i <= _MAX_ID:
                raise ValueError(f"expected ids of 0..{_MAX_ID}, got {i}")
        return ids


def _from_sentencepiece(data: bytes, config: TokenizerConfig = TokenizerConfig()) -> Tokenizer:
    return Tokenizer(sentencepiece_proto.read_model(data), config)


def _from_hf_json(data: bytes | str, config: TokenizerConfig = TokenizerConfig()) -> Tokenizer:
    vocabulary = hf_json.read_tokenizer_json(data)
    if vocabulary.ends and config.add_eos is False:
        raise ValueError(
            "expected a post_processor that adds <bos> alone, got one that adds <eos> as well; "
            "only folders of sentence-transformers may"
        )
    return Tokenizer(vocabulary, config)


def _from_gguf(header: dict[str, object], config: TokenizerConfig = TokenizerConfig()) -> Tokenizer:
    vocabulary = gguf_header.read_vocabulary(header)
    config, stop_ids = read_gguf_config(header, vocabulary)
    return Tokenizer(vocabulary, config).with_stop_ids(stop_ids, "the GGUF header")


@contextlib.contextmanager
def _collector_paused():
    """Half a million small objects, none of them garbage: the collector would double the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _unnumbered(piece: bytes) -> bytes:
    """`<unused>` for `<unused12>`; other pieces as they are."""
    return re.sub(rb"\d+>$", b">", piece) if piece.startswith(b"<unused") else piece


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > _MAX_FILE:
        raise ValueError(f"{path}: expected a tokenizer of at most {_MAX_FILE} bytes, got {size}")
    return path.read_bytes()
