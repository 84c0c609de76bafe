"""Which channels of a graph live and die together: every channel gets a number, every operator says which are one.

A tensor's label is its channel axis and one number per entry of it; numbers are unified (union-find) where an operator
ties them. A convolution makes new numbers, an addition of two activations unifies theirs pair by pair, padding of
channels adds some, flattening repeats them. `FROZEN` is the number of what must stay: whatever reaches a graph output
or an operator without a rule. An unknown operator therefore costs opportunities, never correctness.

Each rule also records what has to change in the file when channels go: constants cut along an axis (`Use`), and sizes
that are written down in attributes and shape constants (`Fix`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from compress import graph
from compress.graph import Array

FROZEN = 0
Role = Literal["makes", "reads", "shapes"]
Alive = Callable[[Array], Array]  # channel numbers → which of them stay


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Label:
    """The channel axis of a tensor and the number of each channel on it."""

    axis: int
    ids: Array


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Use:
    """Input `at` of node number `node` is a constant whose `axis` runs over the channels `ids` of `tensor`."""

    node: int
    at: int
    axis: int
    ids: Array
    role: Role
    tensor: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Fix:
    """Input `at` (a constant) or attribute `attribute` of node number `node` has to become `value(alive)`."""

    node: int
    at: int
    attribute: str
    value: Callable[[Alive], Any]


class Dependencies:
    """The labels of every activation of a model, and what removing channels changes in its file."""

    def __init__(self, model: Any) -> None:
        self.values = graph.arrays(model)
        self.sizes = graph.shapes(model)
        self.readers = graph.consumers(model)
        self.labels: dict[str, Label] = {}
        self.uses: list[Use] = []
        self.fixes: list[Fix] = []
        self._parent = [FROZEN]
        self._at = 0
        for self._at, node in enumerate(model.graph.node):
            if any(item.HasField("g") or item.graphs for item in node.attribute):
                self._freeze_outer(node)
            else:
                RULES.get(node.op_type, barrier)(self, node)
        for name in graph.outputs(model):
            self.freeze(name)

    def root(self, number: int) -> int:
        """Return the smallest number unified with this one; `FROZEN` is the smallest of all."""
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def roots(self, ids: Array) -> Array:
        """Return the root of each number."""
        return np.fromiter((self.root(int(i)) for i in ids), np.int64, len(ids))

    def fresh(self, count: int) -> Array:
        """Return new numbers."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def tie(self, one: Array, other: Array) -> None:
        """Unify numbers pair by pair."""
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            low, high = sorted((self.root(a), self.root(b)))
            self._parent[high] = low

    def freeze(self, *names: str) -> None:
        """Keep every channel of these tensors."""
        for name in names:
            if name in self.labels:
                ids = self.labels[name].ids
                self.tie(ids, np.full(len(ids), FROZEN))

    def rank(self, name: str) -> int | None:
        """Return how many axes a tensor has, None where that is not known."""
        return len(self.sizes[name]) if name in self.sizes else None

    def use(self, at: int, axis: int, ids: Array, role: Role, tensor: str) -> None:
        """Record that constant input `at` of the present node runs over these channels."""
        if ids.any():
            self.uses.append(Use(self._at, at, axis, ids, role, tensor))

    def fix_input(self, at: int, value: Callable[[Alive], Any]) -> None:
        """Record how constant input `at` of the present node follows."""
        self.fixes.append(Fix(self._at, at, "", value))

    def fix_attribute(self, name: str, value: Callable[[Alive], Any]) -> None:
        """Record how an attribute of the present node follows."""
        self.fixes.append(Fix(self._at, -1, name, value))

    def constant(self, node: Any, at: int) -> Array | None:
        """Return the value of a constant input, None where there is none or it is computed."""
        return self.values.get(node.input[at]) if len(node.input) > at else None

    def _freeze_outer(self, node: Any) -> None:
        self.freeze(*node.input)
        for item in node.attribute:
            self.freeze(*graph.outer_names(item))


def barrier(deps: Dependencies, node: Any) -> None:
    """Keep all that comes in; nothing is known about what goes out."""
    deps.freeze(*node.input)


def unary(deps: Dependencies, node: Any) -> None:
    """Pass the channels of the first input on: element by element, or channel by channel without mixing them."""
    deps.freeze(*node.input[1:])
    if node.input[0] in deps.labels:
        deps.labels[node.output[0]] = deps.labels[node.input[0]]


def pool(deps: Dependencies, node: Any) -> None:
    """Pass on the channels of what lies on axis 1, which no pooling mixes."""
    label = deps.labels.get(node.input[0])
    if len(node.output) > 1 or (label is not None and label.axis != 1):
        barrier(deps, node)
    else:
        unary(deps, node)


def elementwise(deps: Dependencies, node: Any) -> None:
    """Tie the channels of all operands, as NumPy broadcasting lines them up."""
    ranks = [deps.rank(name) for name in node.input]
    labels = [deps.labels.get(name) for name in node.input]
    if None in ranks:
        return barrier(deps, node)
    shift = [max(r for r in ranks if r is not None) - (r or 0) for r in ranks]
    axes = {label.axis + by for label, by in zip(labels, shift, strict=True) if label is not None}
    ids = max((label.ids for label in labels if label is not None), key=len, default=np.empty(0, np.int64))
    if len(axes) != 1 or len(ids) < 2:
        return barrier(deps, node)
    axis = axes.pop()
    for at, (name, label) in enumerate(zip(node.input, labels, strict=True)):
        own = axis - shift[at]
        if label is not None and len(label.ids) == len(ids):
            deps.tie(label.ids, ids)
        elif own < 0 or deps.sizes[name][own] == 1:
            deps.freeze(name)
        elif name in deps.values:
            deps.use(at, own, ids, "shapes", node.output[0])
        else:
            deps.tie(ids, np.full(len(ids), FROZEN))
    deps.labels[node.output[0]] = Label(axis, ids)
    return None


def incoming(deps: Dependencies, name: str, axis: int, count: int) -> Array:
    """Return the channels of a layer's input on the axis that the layer sums over."""
    label = deps.labels.get(name)
    if label is not None and label.axis == axis:
        return label.ids
    deps.freeze(name)
    return np.full(count, FROZEN)


def conv(deps: Dependencies, node: Any) -> None:
    """Make new channels and read the old ones; with groups, what goes in and out of one group is one."""
    weight, groups = deps.constant(node, 1), graph.attributes(node).get("group", 1)
    if weight is None:
        return barrier(deps, node)
    turned = node.op_type == "ConvTranspose"
    ins = weight.shape[0] if turned else weight.shape[1] * groups
    outs = weight.shape[1] * groups if turned else weight.shape[0]
    old, new = incoming(deps, node.input[0], 1, ins), deps.fresh(outs)
    deps.labels[node.output[0]] = Label(1, new)
    if groups == 1:
        deps.use(1, 0 if turned else 1, old, "reads", node.input[0])
        deps.use(1, 1 if turned else 0, new, "makes", node.output[0])
    else:
        first = new.reshape(groups, -1)[:, 0]
        deps.tie(new, np.repeat(first, outs // groups))
        deps.tie(old, np.repeat(first, ins // groups))
        deps.use(1, 0, old if turned else new, "makes", node.output[0])
        deps.fix_attribute("group", lambda alive: int(alive(first).sum()))
    return bias(deps, node, 0, new)


def bias(deps: Dependencies, node: Any, axis: int, new: Array) -> None:
    """Cut the bias of a layer with what the layer makes."""
    if len(node.input) < 3 or not node.input[2]:
        return
    if node.input[2] in deps.values:
        deps.use(2, axis, new, "makes", node.output[0])
    else:
        deps.freeze(node.input[2], node.output[0])


def gemm(deps: Dependencies, node: Any) -> None:
    """Make new columns and read the old ones."""
    weight, facts = deps.constant(node, 1), graph.attributes(node)
    if weight is None or facts.get("transA", 0):
        return barrier(deps, node)
    turned = int(facts.get("transB", 0))
    old, new = incoming(deps, node.input[0], 1, weight.shape[turned]), deps.fresh(weight.shape[1 - turned])
    deps.labels[node.output[0]] = Label(1, new)
    deps.use(1, turned, old, "reads", node.input[0])
    deps.use(1, 1 - turned, new, "makes", node.output[0])
    offset = deps.constant(node, 2)
    if offset is None or (offset.ndim and offset.shape[-1] == len(new) > 1):
        bias(deps, node, 0 if offset is None else offset.ndim - 1, new)
    return None


def matmul(deps: Dependencies, node: Any) -> None:
    """Make new channels on the last axis from those on the last axis, by a constant matrix."""
    weight, rank = deps.constant(node, 1), deps.rank(node.input[0])
    if weight is None or weight.ndim != 2 or rank is None:
        return barrier(deps, node)
    label = deps.labels.get(node.input[0])
    if label is not None and label.axis != rank - 1:
        deps.labels[node.output[0]] = label
        return None
    old, new = incoming(deps, node.input[0], rank - 1, weight.shape[0]), deps.fresh(weight.shape[1])
    deps.labels[node.output[0]] = Label(rank - 1, new)
    deps.use(1, 0, old, "reads", node.input[0])
    deps.use(1, 1, new, "makes", node.output[0])
    return None


def norm(deps: Dependencies, node: Any) -> None:
    """Scale and shift each channel of axis 1 by constants of its own."""
    ids = incoming(deps, node.input[0], 1, 0)
    if len(node.output) > 1 or any(name not in deps.values for name in node.input[1:]):
        return barrier(deps, node)
    if len(ids):
        deps.labels[node.output[0]] = Label(1, ids)
        for at in range(1, len(node.input)):
            deps.use(at, 0, ids, "shapes", node.output[0])
    return None


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


def softmax(deps: Dependencies, node: Any) -> None:
    """Pass the channels on where the sum runs over something else."""
    label, rank = deps.labels.get(node.input[0]), deps.rank(node.input[0])
    if label is None or rank is None or graph.attributes(node).get("axis", -1) % rank == label.axis:
        return barrier(deps, node)
    return unary(deps, node)


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


def gather(deps: Dependencies, node: Any) -> None:
    """Look up rows of a constant table: its columns are channels. Picking elsewhere passes the channels on."""
    table, axis = deps.constant(node, 0), graph.attributes(node).get("axis", 0)
    label, rank, picked = deps.labels.get(node.input[0]), deps.rank(node.input[0]), deps.constant(node, 1)
    lookups = deps.rank(node.input[1])
    if table is not None and table.ndim == 2 and axis == 0 and lookups is not None and table.dtype.kind == "f":
        deps.freeze(node.input[1])
        new = deps.fresh(table.shape[1])
        deps.labels[node.output[0]] = Label(lookups, new)
        return deps.use(0, 1, new, "makes", node.output[0])
    if label is None or rank is None or picked is None or axis % rank == label.axis:
        return barrier(deps, node)
    shift = picked.ndim - 1 if axis % rank < label.axis else 0
    deps.labels[node.output[0]] = Label(label.axis + shift, label.ids)
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


Rule = Callable[[Dependencies, Any], None]
UNARY = (
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid",
    "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign",
    "Sin", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
)  # fmt: skip
ELEMENTWISE = ("Add", "Div", "Max", "Mean", "Min", "Mul", "Pow", "PRelu", "Sub", "Sum", "Where")
POOLS = ("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool")
REDUCES = ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "ReduceSumSquare")
RULES: dict[str, Rule] = {
    **dict.fromkeys(UNARY, unary), **dict.fromkeys(ELEMENTWISE, elementwise), **dict.fromkeys(POOLS, pool),
    **dict.fromkeys(REDUCES, reduce), "Conv": conv, "ConvTranspose": conv, "Gemm": gemm, "MatMul": matmul,
    "BatchNormalization": norm, "InstanceNormalization": norm, "Concat": concat, "Split": split, "Slice": slices,
    "Pad": pad, "Transpose": transpose, "Reshape": reshape, "Flatten": reshape, "Squeeze": squeeze,
    "Unsqueeze": unsqueeze, "Softmax": softmax, "LogSoftmax": softmax, "Resize": resize, "Gather": gather, "Shape": shape,
}  # fmt: skip
