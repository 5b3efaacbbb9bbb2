"""Reads collectives from the text of a compiled module: the compiler reports them nowhere else."""

import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = dict(pred=1, s8=1, u8=1, bf16=2, f16=2, s16=2, u16=2, f32=4, s32=4, u32=4, f64=8, s64=8, u64=8)


class Operation(NamedTuple):
    """A line `name = shape kind(arguments), attributes`. arguments: operands, parameter number, or constant."""

    name: str
    shape: str
    kind: str
    arguments: str
    attributes: str

    @classmethod
    def parse(cls, line: str) -> "Operation | None":
        """Parses a line; None when it is not an operation."""
        found = re.match(r" +(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\(([^)]*)\)(.*)", line)
        return cls(*found.groups()) if found else None

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def called(self, *names: str) -> list[str]:
        """Returns the computations in these attributes, such as `calls=%a` or `branch_computations={%a, %b}`."""
        lists = re.findall(rf"\b(?:{'|'.join(names)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name for found in lists for name in re.findall(r"[\w.\-]+", found)]


Block = dict[str, Operation]
BRANCHES = ("to_apply", "calls", "called_computations", "branch_computations", "true_computation", "false_computation")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Counts a device's collectives: {kind: {count, bytes}}, bytes of the whole arrays gathered, reduced or moved.

    Each collective counts as often as it runs (`_runs`).
    """
    found: dict[str, Counter[str]] = {}
    for kind, operation, block, times in _runs(text):
        found.setdefault(kind, Counter()).update(count=times, bytes=times * _moved(kind, operation, block))
    return {kind: dict(found[kind]) for kind in KINDS if kind in found}


def summed(text: str) -> dict[str, int]:
    """Counts the elements of a device's all-reduces and reduce-scatters by dtype: the precision of its sums."""
    found: Counter[str] = Counter()
    for kind, operation, _, times in _runs(text):
        if kind in ("all-reduce", "reduce-scatter"):
            for dtype, elements in _arrays(operation.shape):
                found[dtype] += times * elements
    return dict(found)


def _runs(text: str) -> Iterator[tuple[str, Operation, Block, int]]:
    """Yields (kind, operation, its block, how often it runs) of every collective.

    The body of a loop counts as often as it runs, or once if neither the compiler nor its condition gives a number.
    Every branch of a conditional counts. A collective that the compiler split to overlap it with computation has one
    channel and counts once in its loop.
    """
    blocks, entry = _parse(text)

    def visit(block: Block, times: int, seen: set[str]) -> Iterator[tuple[str, Operation, Block, int]]:
        for operation in block.values():
            kind = operation.kind.removesuffix("-start")
            if kind in KINDS:
                channel = re.search(r"channel_id=(\d+)", operation.attributes)
                if channel and channel[1] in seen:
                    continue
                seen.update(channel.groups() if channel else ())
                yield kind, operation, block, times
            elif kind == "while":
                (body,), (condition,) = operation.called("body"), operation.called("condition")
                trips = _trips(operation, block, blocks.get(condition, {})) or 1
                yield from visit(blocks[body], times * trips, set())
            elif kind not in ("async-update", "async-done"):  # these repeat the computation that async-start calls
                for name in operation.called(*BRANCHES):
                    yield from visit(blocks.get(name, {}), times, seen)

    yield from visit(blocks[entry], 1, set())


def _parse(text: str) -> tuple[dict[str, Block], str]:
    """Returns the computations by name, and the name of the entry computation."""
    blocks: dict[str, Block] = {}
    entry = name = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = head[2]
            blocks[name] = {}
            entry = name if head[1] else entry
        elif name and (operation := Operation.parse(line)):
            blocks[name][operation.name] = operation
    return blocks, entry


def _moved(kind: str, operation: Operation, block: Block) -> int:
    if kind == "reduce-scatter":
        return sum(_bytes(block[name].shape) for name in operation.operands)
    if operation.kind == "all-gather-start":  # operands, then results
        return _bytes(operation.shape) - sum(_bytes(block[name].shape) for name in operation.operands)
    if operation.kind == "collective-permute-start":  # operand, result, two numbers
        return _bytes(block[operation.operands[0]].shape)
    return _bytes(operation.shape)


def _bytes(shape: str) -> int:
    return sum(WIDTHS.get(dtype, 0) * elements for dtype, elements in _arrays(shape))


def _arrays(shape: str) -> list[tuple[str, int]]:
    """Returns (dtype, elements) of each array of a shape."""
    found = re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
    return [(dtype, prod(map(int, filter(None, dims.split(","))))) for dtype, dims in found]


def _trips(loop: Operation, block: Block, condition: Block) -> int | None:
    """Returns the trip count of a loop: the compiler's, or N of `counter < N` minus the counter's start."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    compared = next((o for o in condition.values() if o.kind == "compare" and "direction=LT" in o.attributes), None)
    if compared is None or len(compared.operands) != 2:
        return None
    counter, limit = condition[compared.operands[0]], _constant(compared.operands[1], condition)
    if counter.kind != "get-tuple-element" or limit is None:
        return None
    index = re.search(r"index=(\d+)", counter.attributes)
    start = block.get(loop.operands[0])
    begins = _constant(start.operands[int(index[1])], block) if index and start and start.kind == "tuple" else None
    return limit - (begins or 0)


def _constant(name: str, block: Block) -> int | None:
    """Returns the value of a constant operation, following copies."""
    operation = block.get(name)
    while operation and operation.kind in ("copy", "bitcast"):
        operation = block.get(operation.operands[0])
    number = operation and operation.kind == "constant" and operation.arguments.lstrip("-").isdigit()
    return int(operation.arguments) if operation and number else None
