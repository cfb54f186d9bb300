"""How many JSON Schemas are followed, and what masks cost: MaskBench, beside llguidance alone.

    git clone https://github.com/guidance-ai/jsonschemabench
    python -m gemma_jax.benchmarks.masks jsonschemabench/maskbench/data \\
        --output gemma_jax/benchmarks/results/NAME.json

Its files hold a schema each, and instances that fit it or do not. Of a fixed sample of them, every
instance is written token by token with Gemma's vocabulary: is each token legal where it comes, and
may the text end there? "gemma-jax" is `GrammarCompiler` with its limits and its one style of white
space; "llguidance" is the library with the same pieces and its own defaults.

Local letters: W words of a mask.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gemma_jax.benchmarks.speed import machine_facts
from gemma_jax.inference.constraints import GrammarCompiler
from gemma_jax.text import Tokenizer

SAMPLE, SEED = 800, 0


@dataclass
class Tally:
    """Counts and times of one engine.

    Attributes:
      refused: Reason -> schemas that were refused with it.
      compile_ms: Until the first mask is there, per schema that was taken.
      mask_us: Per token, the first one left out.
      wrong: Instances that were taken for what they are not, by file and place.
    """

    schemas: int = 0
    refused: Counter = field(default_factory=Counter)
    valid: int = 0
    valid_accepted: int = 0
    invalid: int = 0
    invalid_refused: int = 0
    compile_ms: list[float] = field(default_factory=list)
    mask_us: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        """As JSON, with the times as percentiles."""
        facts = asdict(self) | {
            "refused": sum(self.refused.values()),
            "refusals": dict(self.refused.most_common()),
        }
        return facts | {name: _percentiles(facts[name]) for name in ("compile_ms", "mask_us")}


class Alone:
    """llguidance without us, as a constraint that knows `mask`, `accept` and `may_end`."""

    def __init__(self, vocabulary: Any, schema: str):
        from llguidance import LLMatcher

        grammar = LLMatcher.grammar_from_json_schema(schema)
        self._matcher = LLMatcher(vocabulary, grammar, log_level=0)
        self._check()

    def copy(self) -> "Alone":
        """Another one in the same place."""
        other = object.__new__(Alone)
        other._matcher = self._matcher.deep_copy()
        return other

    def mask(self) -> np.ndarray:
        mask_W = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return mask_W

    def accept(self, ids: Sequence[int]) -> None:
        if not self._matcher.consume_tokens(ids):
            raise ValueError(self._matcher.get_error())

    @property
    def may_end(self) -> bool:
        return self._matcher.is_accepting()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error())


def vocabulary_alone(tokenizer: Tokenizer) -> Any:
    """llguidance's view of the same pieces."""
    from llguidance import LLTokenizer, TokenizerWrapper

    def encode(text: bytes) -> list[int]:
        return tokenizer.encode(text.decode(), parse_special=False)

    encode.eos_token_id, encode.bos_token_id = tokenizer.eos_id, None
    encode.special_token_ids, encode.tokens = [tokenizer.eos_id], tokenizer.texts()
    encode.tokens[tokenizer.eos_id] = b"\xff<eos>"
    return LLTokenizer(TokenizerWrapper(encode))


def sample(folder: Path, count: int, seed: int) -> list[Path]:
    """So many of the folder's files, always the same ones. Raises `ValueError` if it has none."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder}: expected MaskBench's data, files *.json with a schema each")
    return sorted(random.Random(seed).sample(files, min(count, len(files))))


def measure(
    start: Callable[[str], Any], files: Sequence[Path], encode: Callable[[str], list[int]]
) -> Tally:
    """Writes all instances of the files.

    Args:
      start: Makes a constraint of a schema, or raises `ValueError`.
    """
    tally = Tally()
    for path in files:
        case = json.loads(path.read_text("utf-8"))
        tally.schemas += 1
        begin = time.perf_counter()
        try:
            constraint = start(json.dumps(case["schema"]))
            constraint.mask()
        except ValueError as error:
            tally.refused[_reason(error)] += 1
            continue
        tally.compile_ms.append((time.perf_counter() - begin) * 1e3)
        for place, test in enumerate(case.get("tests", [])):
            text = json.dumps(test["data"], ensure_ascii=False)
            fits = _fits(constraint.copy(), encode(text), tally.mask_us)
            if test["valid"]:
                tally.valid += 1
                tally.valid_accepted += fits
            else:
                tally.invalid += 1
                tally.invalid_refused += not fits
            if fits != test["valid"]:
                tally.wrong.append(f"{path.name}:{place}")
    return tally


def _fits(constraint: Any, ids: Sequence[int], mask_us: list[float]) -> bool:
    try:
        for n, i in enumerate(ids):
            begin = time.perf_counter()
            mask_W = constraint.mask()
            if n:
                mask_us.append((time.perf_counter() - begin) * 1e6)
            if not mask_W[i // 32] >> np.uint32(i % 32) & 1:
                return False
            constraint.accept([i])
        return constraint.may_end
    except ValueError:
        return False


def _reason(error: ValueError) -> str:
    """Without what differs from schema to schema."""
    return str(error).partition("\n")[0][:100]


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    shares = {"p50": 50, "p90": 90, "p99": 99, "p99.9": 99.9, "max": 100}
    found = {name: float(np.percentile(values, share)) for name, share in shares.items()}
    return {"count": len(values), "mean": float(np.mean(values))} | {
        name: round(value, 3) for name, value in found.items()
    }


def engines(tokenizer: Tokenizer) -> Iterator[tuple[str, Callable[[str], Any], float]]:
    """Name, how a constraint begins, and seconds to prepare the vocabulary."""
    begin = time.perf_counter()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    compiler.constraint("regex", "a")
    yield "gemma-jax", partial(compiler.constraint, "schema"), time.perf_counter() - begin
    begin = time.perf_counter()
    vocabulary = vocabulary_alone(tokenizer)
    yield "llguidance", partial(Alone, vocabulary), time.perf_counter() - begin


def main(arguments: Sequence[str] | None = None) -> None:
    import llguidance

    from gemma_jax.loading import load_tokenizer

    parser = argparse.ArgumentParser(description="MaskBench")
    parser.add_argument("folder", type=Path, help="of jsonschemabench: maskbench/data")
    parser.add_argument("--model", default="gemma3-270m", help="whose vocabulary")
    parser.add_argument("--count", type=int, default=SAMPLE)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    tokenizer = load_tokenizer(args.model)
    files = sample(args.folder, args.count, args.seed)
    result: dict[str, Any] = {
        "command": " ".join(["python -m gemma_jax.benchmarks.masks", *(arguments or sys.argv[1:])]),
        "date": date.today().isoformat(),
        "machine": machine_facts(),
        "llguidance": llguidance.__version__,
        "vocabulary": tokenizer.vocab_size,
        "files": {"folder": len(list(args.folder.glob("*.json"))), "sample": len(files)},
        "seed": args.seed,
        "engines": {},
    }
    for name, start, seconds in engines(tokenizer):
        tally = measure(start, files, partial(tokenizer.encode, parse_special=False))
        result["engines"][name] = {"prepare_s": seconds} | tally.told()
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if args.output:
        args.output.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
