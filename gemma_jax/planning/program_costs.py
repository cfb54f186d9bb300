"""Operations and bytes of a compiled program, read off its text: what a step really does.

XLA's own analysis counts once what a loop runs; here it counts as often as the loop turns. The rest
is by its rules. Operations are those of matrix products and convolutions. Bytes: what is no part of
a fusion reads its operands and writes its results once, of slices only what they take; what lies in
a chip's own fast memory (`S(1)` in a layout) costs nothing.
"""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from gemma_jax.planning.hlo_text import Instruction, Shape, parse, runs_of, shapes_in

_KERNEL = re.compile(r'custom_call_target="(tpu_custom_call|mosaic_gpu|__gpu\$xla\.gpu\.triton)')
# These move nothing themselves: names, loops around what is counted, ends of what has begun.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "async-start", "async-update",
    "optimization-barrier", "add-dependency",
}  # fmt: skip
_FREE_CALL = re.compile(r'"(AllocateBuffer|ConcatBitcast|AssumeGatherIndicesInBound|Async\w+)"')
_TAKES = {"dynamic-slice", "slice", "gather"}  # read of their first operand what they make
_PASSES = {"bitcast", "reshape"}
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")


@dataclass(frozen=True)
class ProgramCosts:
    """What one device does in a step.

    Attributes:
      operations: Multiplications and additions of matrix products, without those in kernels.
      moved_bytes: Read from its memory, and written there.
      kernels: Calls of hand-written kernels, of which the text does not tell operations.
    """

    operations: float
    moved_bytes: int
    kernels: int


def program_costs(text: str) -> ProgramCosts:
    """Of the text of a program after all passes."""
    lines, entry = parse(text)
    computations = {name: _Computation(of) for name, of in lines.items()}
    operations, moved, kernels = 0.0, 0, 0
    for (name, where), times in runs_of(lines, entry).items():
        if name not in computations:
            continue
        here = computations[name]
        operations += times * here.operations()
        if not where.fusions:
            moved += times * sum(here.moved(line, computations) for line in here.lines)
        kernels += times * sum(bool(_KERNEL.search(line.rest)) for line in here.lines)
    return ProgramCosts(operations, moved, kernels)


class _Computation:
    """Lines by name, and which of them read which."""

    def __init__(self, lines: list[Instruction]):
        self.lines = lines
        self.by_name = {line.name: line for line in lines}
        self.operands = {line.name: line.operands for line in lines}
        self.readers: dict[str, list[Instruction]] = defaultdict(list)
        for line in lines:
            for name in dict.fromkeys(self.operands[line.name]):
                self.readers[name].append(line)
        self.parameters = {
            int(line.rest.partition(")")[0]): line.name
            for line in lines
            if line.operation == "parameter"
        }
        self.root = next((line for line in lines if line.root), None)

    def operations(self) -> float:
        """Of its products, once."""
        total = 0.0
        for line in self.lines:
            if line.operation in ("dot", "convolution"):
                shapes = [_dims(self.by_name[name].result) for name in self.operands[line.name]]
                count = _dot if line.operation == "dot" else _convolution
                total += count(line, *shapes)
        return total

    def moved(self, line: Instruction, others: "Mapping[str, _Computation]") -> int:
        """Bytes that one line reads and writes."""
        operation, names = line.operation, self.operands[line.name]
        if operation in _FREE or operation.endswith("-done") or _FREE_CALL.search(line.rest):
            return 0
        inner = others.get(line.called[0]) if operation == "fusion" and line.called else None
        if inner is not None:
            read = sum(
                min(_bytes(self.by_name[name].result), inner.taken(inner.parameters[at], others))
                for at, name in enumerate(names)
            )
            return read + inner.written(others)
        whole = [_bytes(self.by_name[name].result) for name in names]
        if operation == "dynamic-update-slice":
            return 2 * whole[1]
        if operation == "scatter":
            return sum(whole[1:]) + whole[-1]
        made = sum(map(_size, line.made))
        if operation in _TAKES:
            return (min(made, whole[0]) if whole[0] else 0) + made + sum(whole[1:])
        return sum(whole) + made

    def taken(self, name: str, others: "Mapping[str, _Computation]") -> int:
        """Bytes that are read of an array, at most; a large number if all of it is."""
        total = 0
        for line in self.readers[name]:
            first = self.operands[line.name][0] == name
            if line.operation in _TAKES and first:
                total += _bytes(line.result, anywhere=True)
            elif line.operation == "dynamic-update-slice" and first:
                pass  # written in its place
            elif line.operation in _PASSES:
                total += self.taken(line.name, others)
            elif line.operation == "fusion" and line.called[0] in others:
                inner = others[line.called[0]]
                places = [i for i, n in enumerate(self.operands[line.name]) if n == name]
                total += sum(inner.taken(inner.parameters[i], others) for i in places)
            elif not (line.root and line.operation == "tuple"):
                return _ALL
        return total

    def written(self, others: "Mapping[str, _Computation]") -> int:
        """Bytes of what a fusion makes; of an array that is changed in its place, the change."""
        assert self.root is not None
        roots = [self.root]
        if self.root.operation == "tuple":
            roots = [self.by_name[name] for name in self.operands[self.root.name]]
        return sum(self._change(root, others) for root in roots)

    def _change(self, line: Instruction, others: "Mapping[str, _Computation]") -> int:
        size, names = _bytes(line.result), self.operands[line.name]
        if size and line.operation == "dynamic-update-slice":
            return min(size, _bytes(self.by_name[names[1]].result, anywhere=True))
        if size and line.operation in _PASSES:
            return min(size, self._change(self.by_name[names[0]], others) or size)
        if size and line.operation == "fusion" and line.called[0] in others:
            return min(size, others[line.called[0]].written(others))
        return 0 if line.operation == "parameter" else size


_ALL = 1 << 62


def _bytes(result: str, anywhere: bool = False) -> int:
    """Of arrays in the device's memory, or anywhere."""
    return sum(_size(shape, anywhere) for shape in shapes_in(result))


def _size(shape: Shape, anywhere: bool = False) -> int:
    return 0 if "S(" in shape.layout and not anywhere else shape.nbytes


def _dims(result: str) -> tuple[int, ...]:
    return shapes_in(result)[0].dims


def _dot(line: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    said = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line.rest)
    summed = [left[int(n)] for n in said[1].split(",") if n] if said else []
    return 2.0 * math.prod(_dims(line.result)) * math.prod(summed)


def _convolution(line: Instruction, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """By the places where something meets something: dilation and padding meet nothing."""
    labels = _LABELS.search(line.rest)
    assert labels is not None, line
    of_left, of_right, of_made = labels.groups()
    made = dict(zip(of_made, _dims(line.result)))
    left_by, right_by = dict(zip(of_left, left)), dict(zip(of_right, right))
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", _window(line)))
    spatial = [c for c in of_made if c.isdigit()]
    pairs = 1
    for at, letter in enumerate(sorted(spatial)):
        low = _nth(window.get("pad"), at, "0_0").partition("_")[0]
        pairs *= _meetings(
            (left_by[letter], right_by[letter], made[letter]),
            stride=int(_nth(window.get("stride"), at, "1")),
            low=int(low),
            spread=int(_nth(window.get("lhs_dilate"), at, "1")),
            apart=int(_nth(window.get("rhs_dilate"), at, "1")),
        )
    groups = re.search(r"batch_group_count=(\d+)", line.rest)
    return 2.0 * pairs * made["b"] * made["f"] * right_by["i"] / (int(groups[1]) if groups else 1)


def _window(line: Instruction) -> str:
    found = re.search(r"window=\{([^}]*)\}", line.rest)
    return found[1] if found else ""


def _nth(said: str | None, at: int, default: str) -> str:
    return default if said is None else said.split("x")[at]


def _meetings(
    sizes: tuple[int, int, int], *, stride: int, low: int, spread: int, apart: int
) -> int:
    """Pairs of an entry of the input and one of the kernel, over all places of one dimension."""
    entries, taps, places = sizes
    at = np.arange(places)[:, None] * stride + np.arange(taps) * apart - low
    return int(((at >= 0) & (at <= (entries - 1) * spread) & (at % spread == 0)).sum())
