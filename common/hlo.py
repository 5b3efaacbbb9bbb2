"""Communication of a compiled module, read from its text: the compiler has no other account of it."""

import re
from collections import Counter
from math import prod
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}


class Operation(NamedTuple):
    """`name = shape kind(operands), attributes`, as it is written; what a parameter or a constant is stands in `given`."""

    name: str
    shape: str
    kind: str
    given: str
    attributes: str

    @classmethod
    def parse(cls, line: str) -> "Operation | None":
        found = re.match(r" +(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z\-]*)\(([^)]*)\)(.*)", line)
        return cls(*found.groups()) if found else None

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.given)

    def called(self, *names: str) -> list[str]:
        """The computations under these attributes, as `calls=%a` or `branch_computations={%a, %b}`."""
        lists = re.findall(rf"\b(?:{'|'.join(names)})=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return [name for found in lists for name in re.findall(r"[\w.\-]+", found)]


Block = dict[str, Operation]
BRANCHES = ("to_apply", "calls", "called_computations", "branch_computations", "true_computation", "false_computation")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """{kind: {count, bytes}} of one device; bytes are those of whole arrays: what is gathered, scattered, reduced or moved.

    The body of a loop counts as often as it runs, once if neither the compiler nor its condition says how often. Of a conditional every
    branch counts. What the compiler split over several operations, to compute meanwhile, has one channel and counts once in its loop.
    """
    blocks, entry = _parse(text)
    found: dict[str, Counter[str]] = {}

    def visit(block: Block, times: int, seen: set[str]) -> None:
        for operation in block.values():
            kind = operation.kind.removesuffix("-start")
            if kind in KINDS:
                channel = re.search(r"channel_id=(\d+)", operation.attributes)
                if channel and channel[1] in seen:
                    continue
                seen.update(channel.groups() if channel else ())
                found.setdefault(kind, Counter()).update(count=times, bytes=times * _moved(kind, operation, block))
            elif kind == "while":
                (body,), (condition,) = operation.called("body"), operation.called("condition")
                visit(blocks[body], times * (_trips(operation, block, blocks.get(condition, {})) or 1), set())
            elif kind not in ("async-update", "async-done"):  # these name again what async-start calls
                for name in operation.called(*BRANCHES):
                    visit(blocks.get(name, {}), times, seen)

    visit(blocks[entry], 1, set())
    return {kind: dict(found[kind]) for kind in KINDS if kind in found}


def _parse(text: str) -> tuple[dict[str, Block], str]:
    """The computations by name, and the name of the first one that runs."""
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
    arrays = re.findall(r"\b(\w+)\[([\d,]*)\]", shape)
    return sum(WIDTHS.get(dtype, 0) * prod(map(int, filter(None, dims.split(",")))) for dtype, dims in arrays)


def _trips(loop: Operation, block: Block, condition: Block) -> int | None:
    """What the compiler found; or the N of `counter < N`, less the value that the counter starts from."""
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
    """The number that an operation is, through copies."""
    operation = block.get(name)
    while operation and operation.kind in ("copy", "bitcast"):
        operation = block.get(operation.operands[0])
    return int(operation.given) if operation and operation.kind == "constant" and operation.given.lstrip("-").isdigit() else None
