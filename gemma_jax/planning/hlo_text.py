"""What a compiled program does between devices, and to its weights, read off its text.

The text is XLA's HLO after all passes. A computation that a loop runs counts as often as the loop
turns, where its bound is a constant; the loop over tokens, which has none, counts once.
"""

import math
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax

from gemma_jax.inference.stored_programs import no_cache_of_jax

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
MOVES = ("copy", "transpose", *COLLECTIVES)
_SHAPE = re.compile(r"\b(pred|bf16|[fsuc]\d\w*)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_OPERAND = re.compile(r"%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


class Shape(NamedTuple):
    """An array as the text has it: `bf16[8,16]{1,0:T(8,128)}`."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def nbytes(self) -> int:
        """The name of a dtype says its bits, but for `pred`, which takes a byte."""
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype)[0])
        return -(-math.prod(self.dims) * bits // 8)


def shapes_in(text: str) -> list[Shape]:
    """All arrays that stand in a piece of the text."""
    return [
        Shape(dtype, tuple(int(n) for n in dims.split(",") if n), layout)
        for dtype, dims, layout in _SHAPE.findall(text)
    ]


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: what it makes, by which operation, and the rest of the line."""

    root: bool
    name: str
    result: str
    operation: str
    rest: str

    @property
    def shapes(self) -> list[Shape]:
        """Of what it makes."""
        return shapes_in(self.result)

    @property
    def made(self) -> list[Shape]:
        """Of what it makes; of what begins here and ends elsewhere, without the operands that come
        with it, and the signs between the two."""
        if not self.operation.endswith("-start") or len(self.shapes) == 1:
            return self.shapes
        arrays = [shape for shape in self.shapes if shape.dims]
        # A copy has its result in front; others their operands: all-gather: (in, out).
        return arrays[:1] if self.operation == "copy-start" else arrays[len(arrays) // 2 :]

    @property
    def operands(self) -> list[str]:
        """Names of what it reads."""
        depth, end = 1, 0
        while depth and end < len(self.rest):  # layouts of shapes may have brackets, too
            depth += {"(": 1, ")": -1}.get(self.rest[end], 0)
            end += 1
        return _OPERAND.findall(self.rest[:end])

    def attribute(self, name: str) -> str:
        """Of the computation that it names so."""
        return re.search(rf"{name}=%?([\w.\-]+)", self.rest)[1]

    @property
    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        called = _CALLED.findall(self.rest)
        for group in _BRANCHES.findall(self.rest):
            called += [branch.strip().lstrip("%") for branch in group.split(",")]
        return called


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
        with no_cache_of_jax():  # out of which the program would come without its text
            program = lowered.compile(compiler_options=options)
        (file,) = Path(folder).glob("*after_optimizations.txt")
        return program, file.read_text()


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Kind -> how often per step, and bytes of the results on one device."""
    found: dict[str, Counter] = defaultdict(Counter)
    for instruction, times, _ in executed_instructions(text)[0]:
        kind = instruction.operation.removesuffix("-start")
        if kind not in COLLECTIVES or instruction.operation.endswith("-done"):
            continue
        size = sum(shape.nbytes for shape in instruction.made)
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
    executed, has_tokens = executed_instructions(text)
    for instruction, times, where in executed:
        operation = instruction.operation.removesuffix("-start")
        # A copy that begins here and ends elsewhere is a prefetch into faster memory.
        if operation not in MOVES or instruction.operation == "copy-start":
            continue
        if where.fusions > 1 or (where.fusions == 1 and not instruction.root):
            continue
        for dtype, dims, _ in instruction.shapes[-1:]:
            if (dtype, _plain(dims)) in wanted:
                counts[operation, dtype, dims, has_tokens and not where.tokens] += times
    return [Moved(*key, times, before) for (*key, before), times in counts.items()]


@dataclass(frozen=True)
class Where:
    """What is around an instruction: the loop over tokens, and how many fusions."""

    tokens: bool = False
    fusions: int = 0


def executed_instructions(text: str) -> tuple[list[tuple[Instruction, int, Where]], bool]:
    """All instructions with how often each runs in a step; whether there is a loop over tokens."""
    computations, entry = parse(text)
    times = runs_of(computations, entry)
    executed = [
        (instruction, n, where)
        for (name, where), n in times.items()
        for instruction in computations.get(name, ())
    ]
    return executed, any(where.tokens for _, where in times)


def runs_of(
    computations: Mapping[str, list[Instruction]], entry: str
) -> Mapping[tuple[str, Where], int]:
    """How often each computation runs in a step, by what is around it."""
    times: Counter = Counter()

    def visit(name: str, n: int, where: Where) -> None:
        times[name, where] += n
        for instruction in computations.get(name, ()):
            called = instruction.called
            turns, inside = 1, where
            if instruction.operation == "fusion":
                inside = replace(where, fusions=where.fusions + 1)
            elif instruction.operation == "while":
                turns = _turns(computations, instruction)
                inside = where if turns else replace(where, tokens=True)
            for other in called:
                visit(other, n * (turns or 1), inside)

    visit(entry, 1, Where())
    return times


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Computations by name, and the name of the first one."""
    computations: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _HEAD.match(line):
            lines = computations.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            lines.append(Instruction(match[1] is not None, *match.groups()[1:]))
    return computations, entry


def _turns(computations: Mapping[str, list[Instruction]], loop: Instruction) -> int | None:
    """The constant that a loop's counter is held against, if that is its whole condition."""
    if match := re.search(r'known_trip_count":?\{"n":"?(\d+)', loop.rest):
        return int(match[1])
    lines = computations.get(loop.attribute("condition"), [])
    operations = Counter(line.operation for line in lines)
    constants = [
        match[1] for line in lines
        if line.operation == "constant" and line.result.startswith(("s32[]", "u32[]"))
        and (match := re.match(r"(\d+)\)", line.rest))
    ]  # fmt: skip
    compares = operations["compare"] + operations["fusion"]
    plain = compares == 1 and not operations["and"] and len(constants) == 1
    if not plain:
        return None
    return -(-int(constants[0]) // _step(lines, computations.get(loop.attribute("body"), [])))


def _step(condition: list[Instruction], body: list[Instruction]) -> int:
    """By how much a loop's counter grows in a turn; 1 where that cannot be read."""
    counters = [
        re.search(r"index=(\d+)", line.rest)[1] for line in condition
        if line.operation == "get-tuple-element" and line.result.startswith(("s32[]", "u32[]"))
    ]  # fmt: skip
    lines = {line.name: line for line in body}
    root = next((line for line in body if line.root), None)
    if len(counters) != 1 or root is None or root.operation != "tuple":
        return 1
    added = lines.get(root.operands[int(counters[0])])
    if added is None or added.operation != "add":
        return 1
    steps = [
        int(match[1]) for name in added.operands
        if name in lines and lines[name].operation == "constant"
        and (match := re.match(r"(\d+)\)", lines[name].rest))
    ]  # fmt: skip
    return max(steps[0], 1) if len(steps) == 1 else 1


def _plain(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(n for n in dims if n > 1))
