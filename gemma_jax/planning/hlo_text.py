"""What a compiled program does between devices, and to its weights, read off its text.

The text is XLA's HLO after all passes. A computation that a loop runs counts as often as the loop
turns, where its bound is a constant; the loop over tokens, which has none, counts once.
"""

import math
import re
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import jax

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
MOVES = ("copy", "transpose", *COLLECTIVES)
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s64": 8, "f64": 8}
_SHAPE = re.compile(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: what it makes, by which operation, and the rest of the line."""

    root: bool
    result: str
    operation: str
    rest: str

    @property
    def shapes(self) -> list[tuple[str, tuple[int, ...]]]:
        """Dtype and dimensions of what it makes."""
        return [
            (dtype, tuple(int(n) for n in dims.split(",") if n))
            for dtype, dims in _SHAPE.findall(self.result)
        ]


@dataclass(frozen=True)
class Moved:
    """A weight that a step brings into another order, or to other devices.

    Attributes:
      times: In a step, or `before` the loop over tokens, which is once per call.
    """

    operation: str
    dtype: str
    shape: tuple[int, ...]
    times: int
    before: bool = False


def compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """The program, and its text as the compiler itself writes it.

    `Compiled.as_text` reads the program with the parser of this JAX, which need not know all that
    a newer libtpu writes.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        program = lowered.compile(compiler_options=options)
        (file,) = Path(folder).glob("*after_optimizations.txt")
        return program, file.read_text()


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Kind -> how often per step, and bytes of the results on one device."""
    found: dict[str, Counter] = defaultdict(Counter)
    for instruction, times, _ in _executed(text)[0]:
        kind = instruction.operation.removesuffix("-start")
        if kind not in COLLECTIVES or instruction.operation.endswith("-done"):
            continue
        shapes = instruction.shapes
        if instruction.operation.endswith("-start") and len(shapes) > 1:
            shapes = shapes[len(shapes) // 2 :]  # operands come first; all-gather: (in, out)
        size = sum(_size(*shape) for shape in shapes)
        found[kind].update(count=times, bytes=times * size)
    return {kind: dict(found[kind]) for kind in COLLECTIVES if kind in found}


def moved_weights(text: str, shapes: set[tuple[str, tuple[int, ...]]]) -> list[Moved]:
    """Copies, transposes and collectives that write what has the shape of a weight.

    Inside a fusion, where a copy is an order of reading, only the result is written.

    Args:
      shapes: Dtype and dimensions of the weights, whole and as one device holds them; an order of
        dimensions and dimensions of 1 do not matter.
    """
    wanted = {(dtype, _plain(dims)) for dtype, dims in shapes}
    counts: Counter = Counter()
    executed, has_tokens = _executed(text)
    for instruction, times, where in executed:
        operation = instruction.operation.removesuffix("-start")
        # A copy that begins here and ends elsewhere is a prefetch into faster memory.
        if operation not in MOVES or instruction.operation == "copy-start":
            continue
        if where.fusions > 1 or (where.fusions == 1 and not instruction.root):
            continue
        for dtype, dims in instruction.shapes[-1:]:
            if (dtype, _plain(dims)) in wanted:
                counts[operation, dtype, dims, has_tokens and not where.tokens] += times
    return [Moved(*key, times, before) for (*key, before), times in counts.items()]


@dataclass(frozen=True)
class _Where:
    """What is around an instruction: the loop over tokens, and how many fusions."""

    tokens: bool = False
    fusions: int = 0


def _executed(text: str) -> tuple[list[tuple[Instruction, int, _Where]], bool]:
    """All instructions with how often each runs in a step; whether there is a loop over tokens."""
    computations, entry = _parse(text)
    times: Counter = Counter()

    def visit(name: str, n: int, where: _Where) -> None:
        times[name, where] += n
        for instruction in computations.get(name, ()):
            called = _CALLED.findall(instruction.rest)
            for group in _BRANCHES.findall(instruction.rest):
                called += [branch.strip().lstrip("%") for branch in group.split(",")]
            turns, inside = 1, where
            if instruction.operation == "fusion":
                inside = replace(where, fusions=where.fusions + 1)
            elif instruction.operation == "while":
                turns = _turns(computations, instruction)
                inside = where if turns else replace(where, tokens=True)
            for other in called:
                visit(other, n * (turns or 1), inside)

    visit(entry, 1, _Where())
    executed = [
        (instruction, n, where)
        for (name, where), n in times.items()
        for instruction in computations.get(name, ())
    ]
    return executed, any(where.tokens for _, where in times)


def _parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _HEAD.match(line):
            lines = computations.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            lines.append(Instruction(match[1] is not None, *match.groups()[1:]))
    return computations, entry


def _turns(computations: dict[str, list[Instruction]], loop: Instruction) -> int | None:
    """The constant that a loop's counter is held against, if that is its whole condition."""
    if match := re.search(r'known_trip_count":?\{"n":"?(\d+)', loop.rest):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)[1]
    lines = computations.get(condition, [])
    operations = Counter(line.operation for line in lines)
    constants = [
        match[1] for line in lines
        if line.operation == "constant" and line.result.startswith("s32[]")
        and (match := re.match(r"(\d+)\)", line.rest))
    ]  # fmt: skip
    compares = operations["compare"] + operations["fusion"]
    plain = compares == 1 and not operations["and"] and len(constants) == 1
    return int(constants[0]) if plain else None


def _size(dtype: str, dims: tuple[int, ...]) -> int:
    return math.prod(dims) * _BYTES.get(dtype, 4)


def _plain(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in dims if n > 1))
