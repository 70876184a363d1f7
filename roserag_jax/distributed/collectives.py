"""What a compiled program sends between devices, counted from its HLO text."""

import collections
import math
import re
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.+?) ({'|'.join(_KINDS)})(-start)?\(")
_CALLED = re.compile(
    r"(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"%?([\w.-]+) = s32\[\](?:\{\S*\})? constant\((\d+)\)")
_LIMIT = re.compile(r"ROOT .* compare\(.*?%?([\w.-]+)\), direction=LT")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


class Traffic(NamedTuple):
    """Collectives of one kind: how often they run, and the bytes that each device sends for them."""

    count: int
    bytes: float


def count_collectives(hlo: str) -> dict[str, Traffic]:
    """Collectives of a compiled program by kind, with those inside of loops as often as the loops turn.

    Of a conditional all branches are counted. Bytes are those of the ring algorithms: of n devices, (n - 1) / n of the
    complete array, and twice that for an all-reduce. On a TPU a collective that runs beside other work is written once
    more in each of the fusions that it runs beside, with the same channel; it counts once.

    Args:
      hlo: optimized, as `compiled.as_text()` gives it.
    """
    local, called, entry = collections.defaultdict(list), collections.defaultdict(list), None
    owners = {}  # of channels: the first computation that has it
    constants, limits = {}, {}  # by name; of the computations that are a loop's condition, how far it counts
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header.group(2)
            entry = name if header.group(1) else entry
            continue
        found, channel = _COLLECTIVE.search(line), _CHANNEL.search(line)
        if found and (channel is None or owners.setdefault(channel.group(1), name) == name):
            local[name].append((found.group(2), _sent(*found.groups(), line)))
        if constant := _CONSTANT.search(line):
            constants[name, constant.group(1)] = int(constant.group(2))
        if limit := _LIMIT.search(line):
            limits[name] = constants.get((name, limit.group(1)), 1)
        trips, condition = _TRIPS.search(line), _CONDITION.search(line)
        for one, several in _CALLED.findall(line):
            names = [one] if one else [each.strip().lstrip("%") for each in several.split(",")]
            times = int(trips.group(1)) if trips else condition.group(1) if condition else 1
            called[name] += [(each, times) for each in names]

    totals = collections.defaultdict(lambda: [0, 0.0])

    def visit(name: str, times: int) -> None:
        for kind, size in local[name]:
            totals[kind][0] += times
            totals[kind][1] += times * size
        for each, trips in called[name]:  # a number, or on a TPU the loop's condition, which a scan ends at a constant
            visit(each, times * (trips if isinstance(trips, int) else limits.get(trips, 1)))

    visit(entry, 1)
    return {kind: Traffic(*total) for kind, total in totals.items()}


def _sent(result: str, kind: str, start: str | None, line: str) -> float:
    """Bytes that a device sends for one collective with a result of this type."""
    size = sum(_element_bytes(dtype) * math.prod(map(int, filter(None, dims.split(",")))) for dtype, dims in
               _ARRAY.findall(result))  # fmt: skip
    n = _group_size(line)
    if kind == "collective-permute":
        return size / 2 if start else size  # the asynchronous one returns its operand as well
    if kind == "all-gather" and start:
        size *= n / (n + 1)
    if kind == "reduce-scatter":  # its result is one device's piece
        size *= n
    return size * (n - 1) / n * (2 if kind == "all-reduce" else 1)


def _element_bytes(dtype: str) -> float:
    """Bytes of an element of an HLO type."""
    if dtype == "pred":
        return 1
    bits = re.search(r"\d+", dtype)
    return int(bits.group()) / 8 if bits else 0


def _group_size(line: str) -> int:
    """Devices that take part in one group of a collective."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named.group(1)))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named.group(2))  # of some axes only a factor
        return math.prod(int(factor or sizes[axis]) for axis, factor in parts)
    if iota := re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", line):
        return int(iota.group(1))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed.group(1).count(",") + 1
    return 1
