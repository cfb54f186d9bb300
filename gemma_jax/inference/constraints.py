"""Which tokens a grammar allows next: llguidance behind the `Constraint` of a request.

llguidance knows a text's bytes, not its ids: special and unused ids, and rows of the embedding
beyond the tokenizer, are no text for it and never legal, but for the markers of calls where a
grammar names them (`<escape>`). Where a text may end, exactly the stop ids
are legal beside what continues it.

Where the grammar leaves one way to go on, a mask holds the one token that the tokenizer itself
would write there. So `forced` tells nothing that the masks would not have led to; reading its
tokens in one pass saves time and leaves the text as it is. Where there is a choice, every spelling
is legal, as it is for the model alone.

Local letters: W words of a mask.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from gemma_jax.inference.grammar import Grammar
from gemma_jax.text import Tokenizer
from gemma_jax.text.tool_formats import FUNCTIONGEMMA, marker_ids
from gemma_jax.text.tool_marker_reader import END_CALL, ESCAPE, START_CALL

Result = TypeVar("Result")

NAMED = (START_CALL, END_CALL, ESCAPE)  # tokens that are no text, and that grammars may name
MISSING = "structured output needs llguidance: pip install 'gemma-jax[grammar]'"

# Objects as `json.dumps` writes them. White space wherever JSON allows it would leave nothing to
# foresee, and a model that has lost its way would write nothing else.
_JSON_STYLE = {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "coerce_one_of": False,
    "lenient": False,
}


@dataclass(frozen=True, kw_only=True)
class GrammarLimits:
    """Bounds what a grammar may cost: it may come from anybody.

    Attributes:
      max_bytes: Of the grammar's text, in UTF-8.
      compile_seconds: How long it may take until the first mask.
      symbols: Of the productions that a grammar becomes.
      lexer_states: About 2 kB each.
      compile_fuel, step_fuel: Work on regular expressions when the grammar is compiled and for one
        mask, about 50,000 and 14,000 per ms.
      step_items: Parser items of one mask, about 20,000 per ms.

    Examples:
      >>> import gemma_jax as gj
      >>> gj.GrammarLimits(compile_seconds=1).max_bytes
      262144
    """

    max_bytes: int = 1 << 18
    compile_seconds: float = 5.0
    symbols: int = 500_000
    lexer_states: int = 50_000
    compile_fuel: int = 1_000_000
    step_fuel: int = 200_000
    step_items: int = 50_000


class GrammarCompiler:
    """Makes constraints for one vocabulary. Threads may share it.

    The vocabulary is prepared when the first constraint is asked for, which takes about a second
    for Gemma's 262,144 pieces.

    Args:
      tokenizer: Whose ids the model writes.
      vocab_size: Of the model, V: masks are for so many ids.
      stop_ids: What may end a text; default: the tokenizer's.
      limits: On each grammar.

    Raises:
      ImportError: llguidance is missing.
      ValueError: A stop id that is part of texts, or that the model does not have.

    Examples:
      >>> import gemma_jax as gj
      >>> model, tok = gj.load("checkpoints/digits")
      >>> compiler = gj.GrammarCompiler(tok, model.cfg.vocab_size)
      >>> constraint = compiler.constraint("regex", "(yes|no)")
      >>> constraint.accept(tok.encode("no"))
      >>> constraint.complete
      True
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        stop_ids: Sequence[int] | None = None,
        limits: GrammarLimits = GrammarLimits(),
    ):
        self._llguidance = _import_llguidance()
        self.limits, self.vocab_size = limits, vocab_size
        self._vocabulary = _vocabulary(tokenizer, vocab_size)
        self._stop_words = _stop_words(
            self._vocabulary, tokenizer.stop_ids if stop_ids is None else stop_ids, tokenizer
        )

    def constraint(self, kind: str, text: str) -> "GrammarConstraint":
        """A constraint on a text that begins now.

        Args:
          kind: `"schema"`, `"regex"` or `"lark"`, see `Grammar`.

        Raises:
          ValueError: The grammar is not valid, asks for what is not supported, fits no text, or
            exceeds a limit. Unsupported keywords of a schema are named, never ignored.
        """
        limits = self.limits
        if (size := len(text.encode(errors="surrogatepass"))) > limits.max_bytes:
            raise ValueError(f"the {kind} has {size} bytes, more than {limits.max_bytes}")
        grammar = self._grammar(kind, text)

        def compiled() -> Any:
            matcher = self._llguidance.LLMatcher(
                self._vocabulary.prepared(), grammar, log_level=0, limits=self._parser_limits()
            )
            if matcher.is_error():
                raise ValueError(_refusal(kind, matcher.get_error()))
            constraint = GrammarConstraint(matcher, self._vocabulary.legal_W, self._stop_words)
            try:
                constraint.mask()  # makes the parser's tables, and finds what fits no text
            except ValueError as error:
                reason = matcher.get_error() if matcher.is_error() else str(error)
                raise ValueError(_refusal(kind, reason)) from None
            return constraint

        self._vocabulary.prepared()  # once, and no part of the time that a grammar may take
        constraint = _within(limits.compile_seconds, compiled)
        if constraint is None:
            raise ValueError(f"the {kind} takes more than {limits.compile_seconds} s to compile")
        return constraint

    def of(self, grammar: Grammar) -> "GrammarConstraint":
        """As `constraint`."""
        return self.constraint(grammar.kind, grammar.text)

    def _grammar(self, kind: str, text: str) -> str:
        make = self._llguidance.LLMatcher
        if kind == "schema":
            try:
                return make.grammar_from_json_schema(text, overrides=_JSON_STYLE)
            except ValueError as error:
                raise ValueError(f"the schema is no JSON object: {_line(str(error))}") from None
        if kind not in ("regex", "lark"):
            raise ValueError(f"a grammar is a schema, regex or lark, got {kind!r}")
        return make.grammar_from_regex(text) if kind == "regex" else make.grammar_from_lark(text)

    def _parser_limits(self) -> Any:
        limits = self.limits
        return self._llguidance.LLParserLimits(
            max_grammar_size=limits.symbols,
            max_lexer_states=limits.lexer_states,
            initial_lexer_fuel=limits.compile_fuel,
            step_lexer_fuel=limits.step_fuel,
            step_max_items=limits.step_items,
            verbose_errors=False,
        )


class GrammarConstraint:
    """Holds one text to a grammar: a `Constraint`.

    One thread at a time may use it; `mask` leaves Python's lock to the others while it works.
    """

    def __init__(self, matcher: Any, legal_W: np.ndarray, stop_W: np.ndarray):
        self._matcher, self._legal_W, self._stop_W = matcher, legal_W, stop_W
        self._ended = False  # by a stop id, of which the matcher is not told

    def copy(self) -> "GrammarConstraint":
        """Another one in the same place, which goes its own way."""
        other = GrammarConstraint(self._matcher.deep_copy(), self._legal_W, self._stop_W)
        other._ended = self._ended
        return other

    def mask(self) -> np.ndarray:
        """uint32 `[ceil(V / 32)]`: bit `i % 32` of word `i // 32` is set if token `i` is legal.

        Raises:
          ValueError: No token is legal (no piece of the vocabulary can spell what must follow), or
            a limit was met.
        """
        if self._ended:
            return np.zeros_like(self._legal_W)
        if self.complete:
            return self._stop_W.copy()
        known_W = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        known_W = known_W[: len(self._legal_W)]
        mask_W = np.zeros_like(self._legal_W)  # a model may have more words, or fewer
        np.bitwise_and(known_W, self._legal_W[: len(known_W)], out=mask_W[: len(known_W)])
        if self._matcher.is_accepting():
            mask_W |= self._stop_W
        if not mask_W.any():
            raise ValueError("no token can continue the text as its grammar asks")
        return mask_W

    def accept(self, token_ids: Sequence[int]) -> None:
        """Moves on by tokens that were chosen.

        Raises:
          ValueError: One of them is not legal, and the place stays what it was; or a limit was met
            in reading it, and the text cannot go on.
        """
        taken = 0
        for i in map(int, token_ids):
            if not self._accept(i):
                self._check()
                self.rewind(taken)
                raise ValueError(f"token {i} is not legal here")
            taken += 1

    def forced(self) -> list[int]:
        """The tokens that must come next, as far as there is no choice; often none.

        A stop id is not among them.
        """
        if self._ended or self.complete:
            return []
        ids = self._matcher.compute_ff_tokens()
        self._check()
        legal = [_has(self._legal_W, i) for i in ids]
        return ids[: legal.index(False)] if False in legal else ids

    def rewind(self, count: int) -> None:
        """Takes back the last `count` tokens accepted. Raises `ValueError` if there are fewer."""
        if count and self._ended:
            self._ended, count = False, count - 1
        if count and not self._matcher.rollback(count):
            raise ValueError(f"cannot take back {count} tokens: {_line(self._matcher.get_error())}")

    @property
    def complete(self) -> bool:
        """Whether nothing but a stop token is legal."""
        stopped = self._matcher.is_stopped()
        if stopped:
            self._check()
        return stopped and not self._ended

    @property
    def may_end(self) -> bool:
        """Whether the text is whole, be there more to come or not."""
        return self._matcher.is_accepting()

    def _accept(self, i: int) -> bool:
        if self._ended:
            return False
        if _has(self._stop_W, i):
            self._ended = self.complete or self._matcher.is_accepting()
            return self._ended
        return _has(self._legal_W, i) and self._matcher.try_consume_tokens([i]) == 1

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot go on: {_line(self._matcher.get_error())}")


class _Vocabulary:
    """Pieces as llguidance takes them, prepared at the first use."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self._tokenizer, self._lock, self._prepared = tokenizer, threading.Lock(), None
        self.vocab_size = vocab_size
        self._texts = tokenizer.texts()[:vocab_size]
        marks = marker_ids(tokenizer, FUNCTIONGEMMA.markers)
        marks = {name: i for name, i in marks.items() if i < len(self._texts)}
        for i in marks.values():
            self._texts[i] = b""  # no text, also where the tokenizer counts it as such
        self._named = {name: i for name, i in marks.items() if name in NAMED}
        legal = [i for i, text in enumerate(self._texts) if text] + list(self._named.values())
        self.legal_W = _words(legal, vocab_size)

    def prepared(self) -> Any:
        """The `LLTokenizer`."""
        llguidance = _import_llguidance()
        with self._lock:
            if self._prepared is None:
                pieces = _Pieces(self._tokenizer, self._texts, self._named)
                self._prepared = llguidance.LLTokenizer(llguidance.TokenizerWrapper(pieces))
            return self._prepared


class _Pieces:
    """What llguidance's `TokenizerWrapper` asks for."""

    def __init__(self, tokenizer: Tokenizer, texts: list[bytes], named: Mapping[str, int]):
        self._tokenizer, self._texts = tokenizer, texts
        self.eos_token_id, self.bos_token_id = tokenizer.eos_id, None
        special = {**named, "<eos>": tokenizer.eos_id}
        self.special_token_ids = list(special.values())
        self.tokens = list(texts)
        for name, i in special.items():
            self.tokens[i] = b"\xff" + name.encode()  # 0xFF marks what is no text

    def __call__(self, text: bytes) -> list[int]:
        return self._encode(text.decode())

    def _encode(self, text: str) -> list[int]:
        """As the tokenizer does, but where it finds an unused piece, that is spelled otherwise."""
        ids = []
        for i in self._tokenizer.encode(text, parse_special=False):
            if i < len(self._texts) and self._texts[i]:
                ids.append(i)
            elif i != self._tokenizer.unk_id:
                piece = self._tokenizer.decode([i])
                ids += self._encode(piece[:1]) + self._encode(piece[1:])
            else:
                break  # the rest cannot be foreseen
        return ids


# Preparing takes a second and tens of megabytes, and every call of `generate` asks again.
@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> _Vocabulary:
    return _Vocabulary(tokenizer, vocab_size)


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError(MISSING) from None
    return llguidance


def _stop_words(vocabulary: _Vocabulary, ids: Sequence[int], tokenizer: Tokenizer) -> np.ndarray:
    for i in ids:
        if not 0 <= i < vocabulary.vocab_size:
            raise ValueError(f"the model has no token {i} to stop at")
        if _has(vocabulary.legal_W, i):
            raise ValueError(
                f"the stop token {i} ({tokenizer.decode([i])!r}) is text that a grammar may ask "
                "for; with a grammar only special tokens end a text"
            )
    if not ids:
        raise ValueError("a grammar needs a stop token to end a text with; give stop_ids")
    return _words(ids, vocabulary.vocab_size)


def _words(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """The mask in which these ids are legal."""
    bits_V = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits_V[np.asarray(ids, int)] = 1
    return np.packbits(bits_V, bitorder="little").view("<u4").astype(np.uint32)


def _has(mask_W: np.ndarray, i: int) -> bool:
    return 0 <= i < 32 * len(mask_W) and bool(mask_W[i // 32] >> np.uint32(i % 32) & 1)


def _within(seconds: float, work: Callable[[], Result]) -> Result | None:
    """What work returns, or `None` if that takes longer; it ends by its own limits then."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        return None


def _refusal(kind: str, error: str) -> str:
    """One line that says why a grammar is refused."""
    if found := re.match(r"Unimplemented keys: \[(.*)\]", error):
        return f"the schema has keywords that are not supported: {found[1]}"
    if error.startswith("NoExtension"):
        return f"no text fits the {kind}"
    return f"the {kind} is refused: {_line(error)}"


def _line(error: str) -> str:
    """The line of an error that says what is wrong."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["unknown reason"]
    reason = next((line for line in lines if line.startswith("error: ")), lines[0])
    return reason.removeprefix("error: ")[:300]
