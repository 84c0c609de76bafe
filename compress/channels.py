"""Structured pruning of an ONNX graph: what can be removed, what it would save, and the smaller graph.

A unit is what has to go together: one channel of a layer with everything that is tied to it. Units that cut the same
constants by the same amount form a `Group`: they cost the same and can be ranked against each other. `shrink` removes
units and whole residual branches and returns a graph that computes exactly what the original does with the removed
channels' weights at zero. Dependency groups are due to Fang et al., DepGraph, CVPR 2023 (arXiv 2301.12900).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from compress import graph
from compress.dependencies import dependencies
from compress.dependencies.labels import FROZEN, Alive, Dependencies, Role
from compress.graph import Array

WRITING = 100  # an output takes as long to requantize and write as so many multiplications (240 with VNNI)
PARTIAL = 1.25  # blocks that a layer with less than one takes as long as: 16 → 12 channels is slower by that

Keep = Mapping[int, Sequence[int]]  # number of the group → the units that stay; a group not named stays whole


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Member:
    """Entries of a constant that belong to the units of a group.

    `index[unit]` are the positions on `axis` of initializer `weight`, input `at` of `node`. `role` is "makes" where the
    node makes the channels of `tensor` with it, "reads" where it sums over them, "shapes" where it scales, shifts or
    joins them channel by channel.
    """

    node: str
    weight: str
    at: int
    axis: int
    index: Array
    role: Role
    tensor: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Group:
    """`size` units, each removable on its own, all of the same cost."""

    size: int
    members: tuple[Member, ...]

    @property
    def makers(self) -> tuple[str, ...]:
        """Return the nodes that make the channels, in the order of the graph."""
        return tuple(dict.fromkeys(member.node for member in self.members if member.role == "makes"))

    @property
    def readers(self) -> tuple[str, ...]:
        """Return the nodes that sum over the channels, in the order of the graph."""
        return tuple(dict.fromkeys(member.node for member in self.members if member.role == "reads"))


@dataclasses.dataclass(frozen=True, slots=True)
class Branch:
    """A residual branch: without it node `add` vanishes too, and who read its result reads the tensor `kept`."""

    add: str
    kept: str
    nodes: tuple[str, ...]


def groups(model: Any) -> tuple[Group, ...]:
    """Return every removable unit, grouped; the order, and so a group's number, depends on the graph alone."""
    deps = dependencies(model)
    return _grouped(model, deps)[0]


def survivors(model: Any, keep: Keep) -> dict[str, tuple[int, Array]]:
    """Return the channel axis of each activation that loses channels, and which of its channels `shrink` keeps."""
    deps = dependencies(model)
    alive = _alive(model, deps, keep)
    kept = {name: (label.axis, alive(label.ids)) for name, label in deps.labels.items()}
    return {name: (axis, np.flatnonzero(stays)) for name, (axis, stays) in kept.items() if not stays.all()}


@dataclasses.dataclass(frozen=True, slots=True)
class Shrink:
    """What to remove: the units that stay in each group cut, and the Adds whose residual branch goes."""

    keep: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    without: tuple[str, ...] = ()

    def apply(self, model: Any) -> Any:
        """Return the smaller graph."""
        return shrink(model, self.keep, [branch for branch in branches(model) if branch.add in self.without])


def shrink(model: Any, keep: Keep, without: Sequence[Branch] = ()) -> Any:
    """Return the model with only the units in `keep`, and without these residual branches.

    Groups and branches are those of `model`. Initializers keep their names, except that one shared by nodes that now
    need different parts of it is stored once for each.

    Raises:
        ValueError: a tensor would be left without channels, or a group has no such unit.
    """
    deps = dependencies(model)
    alive = _alive(model, deps, keep)
    smaller = graph.copy(model)
    changed: dict[tuple[int, int], Array] = {}
    for use in deps.uses:
        place = (use.node, use.at)
        before = changed.get(place, deps.values[model.graph.node[use.node].input[use.at]])
        changed[place] = before.compress(alive(use.ids), axis=use.axis)
    for fix in deps.fixes:
        if fix.at >= 0:
            changed[fix.node, fix.at] = fix.value(alive)
        else:
            node = smaller.graph.node[fix.node]
            rest = [item for item in node.attribute if item.name != fix.attribute]
            graph.replace(node.attribute, [*rest, onnx.helper.make_attribute(fix.attribute, fix.value(alive))])
    _store(smaller, deps.values, changed)
    _bypass(smaller, without)
    del smaller.graph.value_info[:]
    graph.drop_dead(smaller)
    for item in smaller.graph.initializer:
        if 0 in item.dims and 0 not in deps.values.get(item.name, np.ones(1)).shape:
            reader = graph.consumers(smaller)[item.name][0]
            raise ValueError(f"{reader.name or reader.op_type}: no channel is left; keep at least one unit here")
    return smaller


def branches(model: Any) -> tuple[Branch, ...]:
    """Return every residual branch whose shortcut is the plain identity, in the order of the graph.

    That is an Add of a tensor and of what a sub-graph makes of this tensor alone, for this Add alone.
    """
    makers, readers, values = graph.producers(model), graph.consumers(model), graph.arrays(model)
    ends, sizes = graph.outputs(model), graph.shapes(model)
    found = []
    for add in model.graph.node:
        if add.op_type not in ("Add", "Sum") or len(add.input) != 2:
            continue
        for inner, kept in (tuple(add.input), tuple(add.input)[::-1]):
            nodes, sources = _only_for(inner, makers, readers, ends)
            same = sizes.get(add.output[0]) == sizes.get(kept) is not None
            if nodes and same and sources - values.keys() == {kept}:
                names = tuple(node.name for node in model.graph.node if node.output[0] in nodes)
                found.append(Branch(add.name, kept, names))
                break
    return tuple(found)


def _only_for(
    result: str, makers: Mapping[str, Any], readers: Mapping[str, list[Any]], ends: set[str]
) -> tuple[set[str], set[str]]:
    """Return the first outputs of all nodes that exist for `result` alone, and the tensors that they read from outside."""
    nodes: set[str] = set()
    sources: set[str] = set()
    todo = [result]
    while todo:
        name = todo.pop()
        node = makers.get(name)
        users = {user.output[0] for user in readers.get(name, [])}
        if node is None or name in ends or len(node.output) > 1 or (name != result and not users <= nodes):
            sources.add(name)
        elif name != result or len(readers[name]) == 1:
            nodes.add(name)
            sources.discard(name)
            todo.extend(source for source in node.input if source)
    return nodes, {name for name in sources if name not in nodes}


def _bypass(model: Any, without: Sequence[Branch]) -> None:
    """Let the readers of these residual additions read the shortcuts instead, in place."""
    kept = {branch.add: branch.kept for branch in without}
    instead: dict[str, str] = {}
    nodes, ends = [], graph.outputs(model)
    for node in model.graph.node:  # in order, so that a shortcut which is itself the result of one removed is known
        for at, name in enumerate(node.input):
            node.input[at] = instead.get(name, name)
        shortcut = instead.get(kept.get(node.name, ""), kept.get(node.name, ""))
        if not shortcut:
            nodes.append(node)
        elif node.output[0] in ends:
            nodes.append(onnx.helper.make_node("Identity", [shortcut], [node.output[0]], node.name))
        else:
            instead[node.output[0]] = shortcut
    graph.replace(model.graph.node, nodes)


def macs(model: Any) -> dict[str, int]:
    """Return the multiplications of each layer for one sample, by node; a free size counts as one."""
    return {node: count for node, count, _ in _layers(model, 1)}


def countable(model: Any) -> bool:
    """Return whether the weights of every layer that has them by nature are constants, so that they can be counted."""
    values = graph.arrays(model)
    return all(
        node.input[1] in values for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm")
    )


def work(model: Any, block: int) -> int:
    """Return what a sample takes, in multiplications: kernels compute whole blocks of channels, and write outputs."""
    return sum(count + WRITING * outputs for _, count, outputs in _layers(model, block))


def _layers(model: Any, block: int) -> Iterator[tuple[str, int, int]]:
    """Yield each layer's node, multiplications and outputs; channels of layers with weights are counted in whole blocks."""
    sizes, values = _sizes_of_one(model), graph.arrays(model)
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        source, made = sizes.get(node.input[0], ()), sizes.get(node.output[0], ())
        weight = values.get(node.input[1])
        outputs = math.prod(made)
        if weight is None:
            count = outputs * (source[-1] if source else 1)
        else:
            wide = weight.shape[1] if weight.ndim > 1 else 1  # a MatMul with a vector makes one number a row
            filled = _filled(weight.shape[0], block) * _filled(wide, block) * math.prod(weight.shape[2:])
            places = source if node.op_type == "ConvTranspose" else made
            count = math.prod(source[:-1] if node.op_type == "MatMul" else places[2:]) * filled
            if (
                node.op_type == "Conv" and len(made) > 1
            ):  # behind an operator that ONNX does not know, no shape is known
                outputs = outputs // made[1] * _filled(made[1], block)
        yield node.name, count, outputs


def _filled(channels: int, block: int) -> int:
    """Return how many channels a kernel that computes whole blocks takes as long for; one, as depthwise has, is no block."""
    if channels in (1, block) or block == 1:
        return channels
    return -(-channels // block) * block if channels > block else round(PARTIAL * block)


def params(model: Any) -> dict[str, int]:
    """Return the trained numbers of each node that has any: its float constants, a shared one at its first reader."""
    values, seen, found = graph.arrays(model), set[str](), {}
    for node in model.graph.node:
        own = {name for name in node.input if name in values and values[name].dtype.kind == "f"} - seen
        seen |= own
        if own:
            found[node.name] = sum(values[name].size for name in own)
    return found


def rounded(count: float, multiple: int, least: int = 1) -> int:
    """Return the multiple nearest to `count` and at least `least`, itself rounded up to a multiple."""
    return max(round(count / multiple), -(-max(least, 1) // multiple)) * multiple


def _sizes_of_one(model: Any) -> dict[str, tuple[int, ...]]:
    """Return all shapes for a batch of one."""
    one = graph.copy(model)
    del one.graph.value_info[:]
    for item in one.graph.input:
        for size in item.type.tensor_type.shape.dim[:1]:
            size.dim_value = 1
    for item in one.graph.output:
        for size in item.type.tensor_type.shape.dim[:1]:
            size.Clear()
    inferred = onnx.shape_inference.infer_shapes(one, data_prop=True)
    return {name: tuple(max(size, 1) for size in sizes) for name, sizes in graph.shapes(inferred).items()}


def _grouped(model: Any, deps: Dependencies) -> tuple[tuple[Group, ...], tuple[Array, ...]]:
    """Return the groups and, for each, the number of each unit."""
    places: dict[int, dict[int, list[int]]] = {}
    for at, use in enumerate(deps.uses):
        for position, root in enumerate(deps.roots(use.ids).tolist()):
            if root != FROZEN:
                places.setdefault(root, {}).setdefault(at, []).append(position)
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for root in sorted(places):
        alike.setdefault(tuple((at, len(index)) for at, index in places[root].items()), []).append(root)
    found, roots = [], []
    for cost, units in alike.items():
        members = []
        for at, _ in cost:
            use = deps.uses[at]
            node = model.graph.node[use.node]
            index = np.array([places[root][at] for root in units], np.int64)
            members.append(Member(node.name, node.input[use.at], use.at, use.axis, index, use.role, use.tensor))
        found.append(Group(len(units), tuple(members)))
        roots.append(np.array(units, np.int64))
    return tuple(found), tuple(roots)


def _alive(model: Any, deps: Dependencies, keep: Keep) -> Alive:
    """Return the question which channel numbers stay."""
    found, roots = _grouped(model, deps)
    dead = set[int]()
    for number, units in keep.items():
        if not 0 <= number < len(found) or any(not 0 <= unit < found[number].size for unit in units):
            raise ValueError(f"there is no such unit in group {number}: {list(units)}")
        dead.update(np.delete(roots[number], list(units)).tolist())
    gone = np.array(sorted(dead), np.int64)
    return lambda ids: ~np.isin(deps.roots(ids), gone)


def _store(model: Any, values: Mapping[str, Array], changed: Mapping[tuple[int, int], Array]) -> None:
    """Put the changed inputs of nodes into the file, in place: under the old name, or a new one where they differ."""
    versions: dict[str, list[tuple[str, Array]]] = {}
    for at, node in enumerate(model.graph.node):
        for place, name in enumerate(node.input):
            if name not in values:
                continue
            value = changed.get((at, place), values[name])
            known = versions.setdefault(name, [])
            title = next((title for title, other in known if np.array_equal(other, value)), None)
            if title is None:
                title = name if not known else f"{name}.{len(known) + 1}"
                known.append((title, value))
            node.input[place] = title
    kept: list[Any] = []
    for item in model.graph.initializer:
        kept.extend(graph.tensor(title, value) for title, value in versions.get(item.name, ()))
        if item.name not in versions:
            kept.append(item)
    graph.replace(model.graph.initializer, kept)
