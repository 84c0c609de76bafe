"""Rules for operators that move, join, cut or count axes."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from compress import graph
from compress.dependencies.labels import FROZEN, Alive, Dependencies, Label, Rule, barrier
from compress.graph import Array


def concat(deps: Dependencies, node: Any) -> None:
    """Put channels one after the other, or tie them where something else is joined."""
    ranks = {deps.rank(name) for name in node.input}
    rank = ranks.pop()
    labels = [deps.labels.get(name) for name in node.input]
    axes = {label.axis for label in labels if label is not None}
    if ranks or rank is None or len(axes) != 1:
        return barrier(deps, node)
    label_axis, axis = axes.pop(), graph.attributes(node)["axis"] % rank
    if label_axis != axis:
        if None in labels:
            return barrier(deps, node)
        ids = labels[0].ids if labels[0] is not None else np.empty(0)
        for label in labels[1:]:
            deps.tie(ids, label.ids if label is not None else ids)
    else:
        if any(deps.sizes[name][axis] < 0 for name, label in zip(node.input, labels, strict=True) if label is None):
            return barrier(deps, node)
        pieces = []
        for at, (name, label) in enumerate(zip(node.input, labels, strict=True)):
            if label is not None:
                pieces.append(label.ids)
            elif name in deps.values:
                pieces.append(deps.fresh(deps.sizes[name][axis]))
                deps.use(at, axis, pieces[-1], "shapes", node.output[0])
            else:
                pieces.append(np.full(deps.sizes[name][axis], FROZEN))
        ids = np.concatenate(pieces)
    deps.labels[node.output[0]] = Label(label_axis, ids)
    return None


def split(deps: Dependencies, node: Any) -> None:
    """Deal out the channels, or pass all of them to each output."""
    label, rank = deps.labels.get(node.input[0]), deps.rank(node.input[0])
    if label is None:
        return None
    facts = graph.attributes(node)
    parts = deps.constant(node, 1)
    if rank is None or (len(node.input) > 1 and parts is None):
        return barrier(deps, node)
    if facts.get("axis", 0) % rank != label.axis:
        for name in node.output:
            deps.labels[name] = label
        return None
    if parts is None or "split" in facts:  # equal parts have no place for unequal counts
        return barrier(deps, node)
    pieces = np.split(label.ids, np.cumsum(parts)[:-1])
    for name, piece in zip(node.output, pieces, strict=True):
        deps.labels[name] = Label(label.axis, piece)
    deps.fix_input(1, lambda alive: np.array([alive(piece).sum() for piece in pieces], np.int64))
    return None


def slices(deps: Dependencies, node: Any) -> None:
    """Take a range of the channels, or of anything else."""
    label, rank = deps.labels.get(node.input[0]), deps.rank(node.input[0])
    if label is None:
        return None
    starts, ends = deps.constant(node, 1), deps.constant(node, 2)
    if (
        rank is None
        or starts is None
        or ends is None
        or any(name not in deps.values for name in node.input[3:] if name)
    ):
        return barrier(deps, node)
    axes, steps = deps.constant(node, 3), deps.constant(node, 4)
    listed = [int(a) % rank for a in (np.arange(len(starts)) if axes is None else axes)]
    ids = label.ids
    if label.axis in listed:
        at = listed.index(label.axis)
        if steps is not None and steps[at] != 1:
            return barrier(deps, node)
        first, last, _ = slice(int(starts[at]), int(ends[at])).indices(len(ids))
        before, ids = ids[:first], ids[first:last]
        inside = ids

        def moved(old: Array, value: int) -> Array:
            new = old.copy()
            new[at] = value
            return new

        deps.fix_input(1, lambda alive: moved(starts, alive(before).sum()))
        deps.fix_input(2, lambda alive: moved(ends, alive(before).sum() + alive(inside).sum()))
    deps.labels[node.output[0]] = Label(label.axis, ids)
    return None


def pad(deps: Dependencies, node: Any) -> None:
    """Add constant channels before and after (the parameter-free shortcuts of ResNets), or pad something else."""
    label, rank = deps.labels.get(node.input[0]), deps.rank(node.input[0])
    if label is None:
        return None
    pads, axes = deps.constant(node, 1), deps.constant(node, 3)
    if rank is None or pads is None or (len(node.input) > 3 and node.input[3] and axes is None):
        return barrier(deps, node)
    listed = [int(a) % rank for a in (range(rank) if axes is None else axes)]
    ids = label.ids
    if label.axis in listed:
        at, other = listed.index(label.axis), listed.index(label.axis) + len(listed)
        before, after = int(pads[at]), int(pads[other])
        constant = graph.attributes(node).get("mode", b"constant") == b"constant"
        if min(before, after) < 0 or (not constant and before + after > 0):
            return barrier(deps, node)
        front, back = deps.fresh(before), deps.fresh(after)
        ids = np.concatenate([front, ids, back])

        def counted(alive: Alive) -> Array:
            new = pads.copy()
            new[at], new[other] = alive(front).sum(), alive(back).sum()
            return new

        if before + after > 0:
            deps.fix_input(1, counted)
    deps.labels[node.output[0]] = Label(label.axis, ids)
    return None


def transpose(deps: Dependencies, node: Any) -> None:
    """Move the channel axis."""
    label, rank = deps.labels.get(node.input[0]), deps.rank(node.input[0])
    if label is None or rank is None:
        return barrier(deps, node)
    order = list(graph.attributes(node).get("perm", range(rank)[::-1]))
    deps.labels[node.output[0]] = Label(order.index(label.axis), label.ids)
    return None


def reshape(deps: Dependencies, node: Any) -> None:
    """Pass the channels on where one axis of the result holds all of them, perhaps each several times."""
    label = deps.labels.get(node.input[0])
    old, new = deps.sizes.get(node.input[0], ()), deps.sizes.get(node.output[0], ())
    if label is None:
        return None
    found = regrouped(old, new, label)
    if found is None:
        return barrier(deps, node)
    if node.op_type == "Reshape":
        wanted = deps.constant(node, 1)
        if wanted is None or graph.attributes(node).get("allowzero", 0):
            return barrier(deps, node)
        if wanted[found.axis] == 0 and found.axis != label.axis:
            return barrier(deps, node)
        if wanted[found.axis] > 0:

            def counted(alive: Alive) -> Array:
                shape = wanted.copy()
                shape[found.axis] = alive(found.ids).sum()
                return shape

            deps.fix_input(1, counted)
    deps.labels[node.output[0]] = found
    return None


def regrouped(old: Sequence[int], new: Sequence[int], label: Label) -> Label | None:
    """Return the label after a reshape from `old` to `new`, None where the channels are torn apart or sizes unknown.

    In row-major order the channels have stride `inner`; an axis of the result holds them whole if its own stride
    divides that and its extent covers a multiple of all channels. Only one axis can.
    """
    inner, count = old[label.axis + 1 :], len(label.ids)
    if count < 2 or min(inner, default=1) < 1:
        return None
    for axis in range(len(new) - 1, -1, -1):
        stride = math.prod(new[axis + 1 :])
        if new[axis] < 1 or stride < 1:
            return None
        each, rest = divmod(math.prod(inner), stride)
        if rest == 0 and new[axis] % (count * each) == 0:
            return Label(axis, np.tile(np.repeat(label.ids, each), new[axis] // (count * each)))
    return None


def reduce(deps: Dependencies, node: Any) -> None:
    """Pass the channels on where something else is summed up."""
    label, rank = deps.labels.get(node.input[0]), deps.rank(node.input[0])
    facts = graph.attributes(node)
    axes = deps.constant(node, 1) if len(node.input) > 1 else facts.get("axes")
    if label is None or rank is None or axes is None:
        return barrier(deps, node)
    gone = sorted(int(a) % rank for a in axes)
    if label.axis in gone or not gone:
        return barrier(deps, node)
    shift = 0 if facts.get("keepdims", 1) else sum(a < label.axis for a in gone)
    deps.labels[node.output[0]] = Label(label.axis - shift, label.ids)
    return None


def squeeze(deps: Dependencies, node: Any) -> None:
    """Drop axes of size one beside the channels."""
    label, rank, axes = deps.labels.get(node.input[0]), deps.rank(node.input[0]), deps.constant(node, 1)
    if label is None or rank is None or axes is None or label.axis in (gone := [int(a) % rank for a in axes]):
        return barrier(deps, node)
    deps.labels[node.output[0]] = Label(label.axis - sum(a < label.axis for a in gone), label.ids)
    return None


def unsqueeze(deps: Dependencies, node: Any) -> None:
    """Add axes of size one beside the channels."""
    label, rank, axes = deps.labels.get(node.input[0]), deps.rank(node.input[0]), deps.constant(node, 1)
    if label is None or rank is None or axes is None:
        return barrier(deps, node)
    added = {int(a) % (rank + len(axes)) for a in axes}
    kept = [a for a in range(rank + len(axes)) if a not in added]
    deps.labels[node.output[0]] = Label(kept[label.axis], label.ids)
    return None


def resize(deps: Dependencies, node: Any) -> None:
    """Pass the channels on where only other axes change their size."""
    label, scales, sizes = deps.labels.get(node.input[0]), deps.constant(node, 2), deps.constant(node, 3)
    if label is None or "axes" in graph.attributes(node):
        return barrier(deps, node)
    if scales is not None and scales.size and scales[label.axis] == 1:
        deps.labels[node.output[0]] = label
        return None
    if sizes is None or sizes[label.axis] != len(label.ids):
        return barrier(deps, node)

    def counted(alive: Alive) -> Array:
        new = sizes.copy()
        new[label.axis] = alive(label.ids).sum()
        return new

    deps.fix_input(3, counted)
    deps.labels[node.output[0]] = label
    return None


def shape(deps: Dependencies, node: Any) -> None:
    """Nothing follows from a shape of which only other axes are looked at."""
    label, rank, facts = deps.labels.get(node.input[0]), deps.rank(node.input[0]), graph.attributes(node)
    if label is None:
        return None
    if rank is None or "start" in facts or "end" in facts:
        return barrier(deps, node)
    for reader in deps.readers.get(node.output[0], []):
        picked = deps.constant(reader, 1)
        if reader.op_type != "Gather" or picked is None or label.axis in picked.reshape(-1) % rank:
            return barrier(deps, node)
    return None


REDUCES = ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare")
LAYOUT: dict[str, Rule] = {
    **dict.fromkeys(REDUCES, reduce), "Concat": concat, "Split": split, "Slice": slices, "Pad": pad,
    "Transpose": transpose, "Reshape": reshape, "Flatten": reshape, "Squeeze": squeeze, "Unsqueeze": unsqueeze,
    "Resize": resize, "Shape": shape,
}  # fmt: skip
