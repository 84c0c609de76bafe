"""Which cuts are worth measuring. Pure: a graph in, nested cuts out.

The minimum cut of the flow network of Hu et al. (DADS, INFOCOM 2019), with one auxiliary node per tensor so that a tensor
with several readers is paid for once, and with edges back to the producers so that nothing returns from cloud to device.
It only shortlists: the estimates behind it (multiplications, elements) are too rough to decide anything.
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from cloud.split.graph import Flow

INFINITE = 1e18
DEVICE, TAIL = "device", "tail"
MAX_TENSORS = 64
# Sweep of the shortlist: bytes per multiplication-time from starved to lavish, in steps of a factor of two.
BANDWIDTHS = tuple(2.0**step for step in range(-8, 9))
SLOWDOWNS = (3.0, 10.0, 30.0)

Node = int | str | tuple[str, str]


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """A cut to measure: the ops on the device, the tensors that cross, and the share of the work done before it."""

    prefix: frozenset[int]
    tensors: tuple[str, ...]
    share: float
    elements: int
    raw: bool


def shortlist(flow: Flow, most: int = 8, keep: str | None = None, *, deep: bool = False) -> tuple[Candidate, ...]:
    """Return at most `most` nested cuts in order of depth, each smaller on the wire than all before it.

    `keep` names a tensor whose cut is kept whatever it costs (a declared minimum cut). With `deep` a cut may be larger than
    those before it, and the deepest one is always there: it may be the only one that keeps the input private.
    """
    found: dict[frozenset[int], None] = dict.fromkeys(single_tensor_cuts(flow))
    total = sum(op.cost for op in flow.ops) or 1.0
    glued = flow.glued()
    for slowdown in SLOWDOWNS:
        for bandwidth in BANDWIDTHS:
            weight = total / (sum(flow.elements.get(name, 1) for name in flow.inputs) or 1) / bandwidth
            prefix = minimum_cut(
                flow, lambda at, k=slowdown: k * flow.ops[at].cost, lambda at: flow.ops[at].cost,  # type: ignore[misc]
                lambda name, w=weight: w * flow.elements.get(name, 1), glued,  # type: ignore[misc]
            )  # fmt: skip
            if 0 < len(prefix) < len(flow.ops):
                found[prefix] = None
    kept = flow.ancestors(keep) if keep is not None else None
    if kept is not None:
        found[kept] = None
    # What has no size (a sequence, an optional) and what a plan has no room for cannot cross.
    every = [candidate(flow, prefix) for prefix in found]
    fit = [
        cut for cut in every if len(cut.tensors) <= MAX_TENSORS and all(name in flow.elements for name in cut.tensors)
    ]
    return _nested(fit, most, kept, deep=deep)


def candidate(flow: Flow, prefix: frozenset[int]) -> Candidate:
    """Describe the cut after `prefix`."""
    tensors, disguised = flow.live(prefix), flow.disguised()
    total = sum(op.cost for op in flow.ops) or 1.0
    return Candidate(
        prefix,
        tensors,
        sum(flow.ops[at].cost for at in prefix) / total,
        sum(flow.elements.get(name, 1) for name in tensors),
        any(name in disguised for name in tensors),
    )


def single_tensor_cuts(flow: Flow) -> Iterator[frozenset[int]]:
    """Yield the cuts that exactly one tensor crosses, at places that the runtime does not fuse."""
    glued = flow.glued()
    for op in flow.ops:
        for name in op.outputs:
            if name not in glued and name not in flow.outputs and name in flow.elements:
                prefix = flow.ancestors(name)
                if len(prefix) < len(flow.ops) and flow.live(prefix) == (name,):
                    yield prefix


def _nested(
    cuts: Sequence[Candidate], most: int, kept: frozenset[int] | None, *, deep: bool = False
) -> tuple[Candidate, ...]:
    """Keep what no earlier cut dominates, then a chain by inclusion, then the ones that save most bytes per step."""
    chain: list[Candidate] = []
    for cut in sorted(cuts, key=lambda cut: (cut.share, len(cut.prefix), cut.elements)):
        fits = not cut.raw and all(other.prefix < cut.prefix for other in chain)
        if fits and (deep or cut.prefix == kept or all(cut.elements < other.elements for other in chain)):
            chain.append(cut)
        elif cut.prefix == kept:
            chain = [other for other in chain if other.prefix < cut.prefix] + [cut]
    while len(chain) > most:
        gains = [
            INFINITE
            if cut.prefix == kept or (deep and at == len(chain) - 1)
            else (chain[at - 1].elements if at else INFINITE) / max(cut.elements, 1)
            for at, cut in enumerate(chain)
        ]
        del chain[gains.index(min(gains))]
    return tuple(chain)


def minimum_cut(
    flow: Flow,
    device_cost: Callable[[int], float],
    tail_cost: Callable[[int], float],
    transfer_cost: Callable[[str], float],
    glued: frozenset[str] = frozenset(),
) -> frozenset[int]:
    """Return the ops on the device that make work + transfers least.

    `device_cost` and `tail_cost` take an op's place, `transfer_cost` a tensor; no cut crosses a tensor in `glued`.
    """
    capacity: dict[Node, dict[Node, float]] = {DEVICE: {}, TAIL: {}}

    def edge(start: Node, end: Node, value: float) -> None:
        capacity.setdefault(start, {})[end] = capacity.setdefault(start, {}).get(end, 0.0) + value
        capacity.setdefault(end, {}).setdefault(start, 0.0)

    producer = flow.producer()
    for at in range(len(flow.ops)):
        edge(DEVICE, at, tail_cost(at))
        edge(at, TAIL, device_cost(at))
    for name, readers in flow.consumers().items():
        source: Node = producer.get(name, DEVICE)
        edge(source, ("tensor", name), transfer_cost(name))
        for reader in readers:
            edge(("tensor", name), reader, INFINITE)
            if name in producer:
                edge(reader, source, INFINITE)
                if name in glued:
                    edge(source, reader, INFINITE)
    side = _saturate(capacity)
    return frozenset(at for at in range(len(flow.ops)) if at in side)


def _saturate(capacity: dict[Node, dict[Node, float]]) -> set[Node]:
    """Run Dinic's maximum flow and return the nodes on the device's side of the minimum cut."""
    while True:
        level = _levels(capacity)
        if TAIL not in level:
            return set(level)
        _block(capacity, level)


def _levels(capacity: Mapping[Node, Mapping[Node, float]]) -> dict[Node, int]:
    level: dict[Node, int] = {DEVICE: 0}
    todo: deque[Node] = deque([DEVICE])
    while todo:
        node = todo.popleft()
        for other, left in capacity[node].items():
            if left > 1e-9 and other not in level:
                level[other] = level[node] + 1
                todo.append(other)
    return level


def _block(capacity: dict[Node, dict[Node, float]], level: Mapping[Node, int]) -> None:
    """Send a blocking flow along the levels, one path at a time, without recursion."""
    todo = {node: list(ends) for node, ends in capacity.items()}
    path: list[Node] = [DEVICE]
    while path:
        node = path[-1]
        if node == TAIL:
            least = min(capacity[start][end] for start, end in itertools.pairwise(path))
            for start, end in itertools.pairwise(path):
                capacity[start][end] -= least
                capacity[end][start] += least
            path = [DEVICE]
            continue
        while todo[node]:
            other = todo[node][-1]
            if capacity[node][other] > 1e-9 and level.get(other) == level[node] + 1:
                path.append(other)
                break
            todo[node].pop()
        else:
            path.pop()
            if path:
                todo[path[-1]].pop()
