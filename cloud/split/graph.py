"""An ONNX graph as the planner sees it: computing nodes, the tensors between them, and where a cut may lie.

Nodes that depend on constants only (the unfolding of packed weights, for example) are no part of the flow: each segment
takes along those that it needs. A cut is a set of nodes that contains all the producers of its members.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from skills.errors import FormatError

# onnxruntime fuses these into the operator before them: a cut there would cost speed on both sides and ship more entropy.
ACTIVATIONS = frozenset(
    "Relu Clip LeakyRelu Sigmoid HardSigmoid HardSwish Tanh PRelu Elu Softplus Mish Gelu".split()  # noqa: SIM905  a list of words
)
# What only moves, casts or rescales values: the input behind it is still the input.
DISGUISE = frozenset(
    [
        "Identity",
        "Cast",
        "Reshape",
        "Transpose",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Sub",
        "Add",
        "Mul",
        "Div",
        "Neg",
        "Clip",
        "Relu",
        "Sigmoid",
        "Tanh",
        "Pad",
        "Slice",
        "Split",
        "Concat",
        "QuantizeLinear",
        "DequantizeLinear",
        "BatchNormalization",
        "Gather",
        "SpaceToDepth",
        "DepthToSpace",
        "Resize",
        "Expand",
        "Tile",
        "Dropout",
        "LeakyRelu",
        "Sqrt",
        "Exp",
        "Log",
        "Abs",
        "Shape",
        "Pow",
        "Sum",
    ]
)
# Operators whose output sizes follow the values of their inputs from this one on.
SIZED_BY = {
    "AffineGrid": 1, "BlackmanWindow": 0, "CenterCropPad": 1, "Col2Im": 1, "Compress": 1, "ConstantOfShape": 0, "DFT": 1,
    "Expand": 1, "HammingWindow": 0, "HannWindow": 0, "ImageDecoder": 0, "MaxUnpool": 2,
    "MelWeightMatrix": 0, "NonMaxSuppression": 0, "NonZero": 0, "OneHot": 1, "Pad": 1, "Range": 0, "Reshape": 1, "Resize": 1,
    "STFT": 1, "SequenceAt": 1, "Slice": 1, "Split": 1, "SplitToSequence": 1, "Squeeze": 1, "StringSplit": 0, "Tile": 1,
    "TopK": 1, "Unique": 0, "Unsqueeze": 1, "Upsample": 1,
}  # fmt: skip
STANDARD = ("", "ai.onnx", "ai.onnx.ml")


@dataclasses.dataclass(frozen=True, slots=True)
class Op:
    """One computing node: what it reads from the flow, what it gives, and a rough count of its multiplications."""

    index: int
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cost: float


@dataclasses.dataclass(frozen=True, slots=True)
class Flow:
    """The computing part of a graph in topological order; `elements` holds each tensor's size for a batch of one."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ops: tuple[Op, ...]
    elements: Mapping[str, int]

    def producer(self) -> dict[str, int]:
        """Return which op (by place in `ops`) gives each tensor."""
        return {name: at for at, op in enumerate(self.ops) for name in op.outputs}

    def consumers(self) -> dict[str, tuple[int, ...]]:
        """Return which ops read each tensor."""
        found: dict[str, list[int]] = {}
        for at, op in enumerate(self.ops):
            for name in op.inputs:
                found.setdefault(name, []).append(at)
        return {name: tuple(ats) for name, ats in found.items()}

    def live(self, prefix: frozenset[int]) -> tuple[str, ...]:
        """Return the tensors that cross the cut after `prefix`, in the order in which they come to be."""
        after = {name for at, op in enumerate(self.ops) if at not in prefix for name in op.inputs}
        crossing = [name for name in self.inputs if name in after]
        for at, op in enumerate(self.ops):
            if at in prefix:
                crossing += [name for name in op.outputs if name in after or name in self.outputs]
        return tuple(dict.fromkeys(crossing))

    def ancestors(self, tensor: str) -> frozenset[int]:
        """Return the ops that a tensor needs: the smallest cut with it."""
        producer, found, todo = self.producer(), set[int](), [tensor]
        while todo:
            at = producer.get(todo.pop())
            if at is not None and at not in found:
                found.add(at)
                todo += self.ops[at].inputs
        return frozenset(found)

    def glued(self) -> frozenset[str]:
        """Return the tensors no cut may cross, because the runtime fuses their two sides."""
        consumers = self.consumers()
        quantized = any(op.kind == "QuantizeLinear" for op in self.ops)
        inside = set()
        for op in self.ops:
            for name in op.outputs:
                readers = [self.ops[at].kind for at in consumers.get(name, ())]
                activated = len(readers) == 1 and readers[0] in (*ACTIVATIONS, "BatchNormalization")
                fused = activated and op.kind not in ACTIVATIONS and op.kind != "QuantizeLinear"
                unpacked = op.kind == "DequantizeLinear" or (quantized and "QuantizeLinear" in readers)
                silu = "Mul" in readers and "Sigmoid" in readers
                if fused or unpacked or silu or (op.kind == "Sigmoid" and readers == ["Mul"]):
                    inside.add(name)
        return frozenset(inside)

    def disguised(self) -> frozenset[str]:
        """Return the tensors that still are the input, only moved, cast or rescaled."""
        same = set(self.inputs)
        for op in self.ops:
            if op.kind in DISGUISE and any(name in same for name in op.inputs):
                same |= set(op.outputs)
        return frozenset(same)


def read_flow(model: Any, types: Mapping[str, tuple[int, tuple[int, ...]]] | None = None) -> Flow:
    """Return the computing part of an ONNX model; `types` are the observed ones, else they are inferred.

    Raises:
        FormatError: no input that computes, shapes that cannot be inferred, or a sequence of nodes that no order satisfies.
    """
    graph = model.graph
    constants = {item.name for item in graph.initializer} | {item.values.name for item in graph.sparse_initializer}
    inputs = tuple(item.name for item in graph.input if item.name not in constants)
    if not inputs or not graph.output:
        raise FormatError("the model has no input or no output, so there is nothing to split")
    shapes = tensor_types(model) if types is None else types
    elements = {name: math.prod(size if size > 0 else 1 for size in shape) for name, (_, shape) in shapes.items()}
    ops, known, flowing = [], set(inputs) | constants, set(inputs)
    stored: dict[str, Sequence[int]] = {item.name: item.dims for item in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    for index in ordered(graph, known):
        node = graph.node[index]
        reads = [name for name in needs(node) if name in flowing]
        if reads:
            flowing |= set(node.output)
            outputs = tuple(name for name in node.output if name)
            ops.append(
                Op(index, node.op_type, tuple(dict.fromkeys(reads)), outputs, _cost(node, stored, made, elements))
            )
    still = [item.name for item in graph.output if item.name not in flowing]
    if still:
        raise FormatError(f"the model's output {still[0]!r} depends on no input: remove it, then split")
    return Flow(inputs, tuple(item.name for item in graph.output), tuple(ops), elements)


def needs(node: Any) -> Iterator[str]:
    """Yield every name that a node reads, those captured by its subgraphs included."""
    for name in node.input:
        if name:
            yield name
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            own = {item.name for item in [*graph.input, *graph.initializer]}
            own |= {item.values.name for item in graph.sparse_initializer}
            for inner in graph.node:
                yield from (name for name in needs(inner) if name not in own)
                own |= set(inner.output)
            yield from (item.name for item in graph.output if item.name not in own)


def ordered(graph: Any, known: set[str]) -> Iterator[int]:
    """Yield the nodes' places in an order in which every name is known before it is read (most files already have one)."""
    waiting: list[int] = list(range(len(graph.node)))
    every = known | {name for node in graph.node for name in node.output}
    while waiting:
        late = []
        for index in waiting:
            node = graph.node[index]
            if all(name in known or name not in every for name in needs(node)):
                known |= set(node.output)
                yield index
            else:
                late.append(index)
        if len(late) == len(waiting):
            raise FormatError(
                f"the model's nodes form a circle at {graph.node[late[0]].name or graph.node[late[0]].op_type!r}"
            )
        waiting = late


def tensor_types(model: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return (element type, shape) of every tensor whose shape can be inferred; -1 is a free size."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True).graph
    found = {}
    for item in [*inferred.input, *inferred.value_info, *inferred.output]:
        kind = item.type.tensor_type
        if kind.HasField("shape"):
            found[item.name] = (
                kind.elem_type,
                tuple(
                    dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else -1 for dim in kind.shape.dim
                ),
            )
    return found


def observed_types(
    model: Any, feeds: Mapping[str, Any], source: Path | None = None
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return (element type, shape) of every tensor as it comes out of a real run; a size that follows the batch is -1.

    Inference alone leaves holes where a shape is computed. A model with a fixed batch is run once. `source` is where the
    model's external data lies.
    """
    import onnx

    from skills import ort

    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    del wide.graph.output[:]
    constants = {item.name for item in wide.graph.initializer}
    inputs = [item.name for item in wide.graph.input if item.name not in constants]
    names = [name for node in wide.graph.node for name in node.output if name]
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.session(wide.SerializeToString(), optimise=False, beside=source)
    free = all(port.shape and port.shape[0] == -1 for port in session.inputs)
    runs = [
        {name: feeds[name][:1].repeat(size, 0) if size > 1 else feeds[name][:1] for name in inputs}
        for size in ((2, 3) if free else (1,))
    ]
    results = [{**run, **session.run(run)} for run in runs]
    found = {}
    for name, value in results[0].items():
        if not hasattr(value, "dtype"):
            continue  # a sequence or an optional: no cut crosses it
        shapes = [result[name].shape for result in results]
        shape = tuple(-1 if len(set(sizes)) > 1 else int(sizes[0]) for sizes in zip(*shapes, strict=False))
        if value.dtype.kind in "fiub":
            found[name] = (int(onnx.helper.np_dtype_to_tensor_dtype(value.dtype)), shape)
    return found


def free_types(model: Any, seen: Mapping[str, tuple[int, tuple[int, ...]]]) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Return what `observed_types` saw with every size free (-1) that another input may change.

    Such are the sizes behind a free axis of an input, the batch apart, and behind an operator whose output follows the data
    (NonZero, NonMaxSuppression); there only what shape inference proves stays fixed. A tensor inside of which not even the
    number of sizes is proven is left out: no cut may cross it.
    """
    import onnx

    loose = _loose(model)
    if not loose:
        return dict(seen)
    bare, ends = _without_weights(model), {item.name for item in [*model.graph.input, *model.graph.output]}
    del bare.graph.value_info[:]  # what a file says of its insides, or of its outputs, nobody holds it to
    for item in bare.graph.output:
        item.type.tensor_type.ClearField("shape")
    foreign = {name for node in model.graph.node if node.domain not in STANDARD for name in node.output}
    for name, (kind, shape) in seen.items():
        if name not in ends and (name not in loose or name in foreign):
            known = [None if size == -1 or name in loose else size for size in shape]
            bare.graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, known))
    proven = {name: (kind, (-1,) * len(shape)) for name, (kind, shape) in seen.items() if name in ends}
    proven |= tensor_types(bare)
    found = {}
    for name, (kind, shape) in seen.items():
        sure = proven[name][1] if name in loose and name in proven else shape
        if name not in loose or (name in proven and len(sure) == len(shape)):
            found[name] = (kind, tuple(size if size == right else -1 for size, right in zip(shape, sure, strict=True)))
    return found


def _loose(model: Any) -> set[str]:
    """Return the tensors that another input may give another size; those that only follow the batch are not among them."""
    graph = model.graph
    constants = {item.name for item in graph.initializer} | {item.values.name for item in graph.sparse_initializer}
    sizes = {
        item.name: [dim.dim_value for dim in item.type.tensor_type.shape.dim]
        for item in graph.input
        if item.name not in constants
    }
    batched = all(one and one[0] <= 0 for one in sizes.values())
    loose = {name for name, one in sizes.items() if any(size <= 0 for size in (one[1:] if batched else one))}
    telling = set(sizes)  # whose values follow the data, and not only sizes that stay
    _spread([graph.node[index] for index in ordered(graph, constants | telling)], loose, telling)
    return loose - {""}


def _spread(nodes: Sequence[Any], loose: set[str], telling: set[str]) -> None:
    """Add to `loose` and `telling` what the nodes, in order, make so; a branch or a loop passes on what happens in it."""
    for node in nodes:
        reads, sizing = set(needs(node)), set(node.input[SIZED_BY.get(node.op_type, len(node.input)) :])
        sizing |= set(node.input[: {"If": 1, "Loop": 2}.get(node.op_type, 0)])
        resized = bool(reads & loose or sizing & telling)
        for attribute in node.attribute:
            for body in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                inside, told, loop = set(loose), set(telling), node.op_type == "Loop"
                told |= {item.name for item in body.input[2 if loop else 0 :]}  # of a loop the first count and go on
                _spread(body.node, inside, told)
                ends = [item.name for item in body.output]
                resized = resized or not inside.isdisjoint(ends) or (loop and ends[0] in told)
        if resized and node.op_type not in ("Shape", "Size"):
            loose |= set(node.output)
        if resized or (reads & telling and node.op_type not in ("Shape", "Size")):
            telling |= set(node.output)


def _without_weights(model: Any) -> Any:
    """Return the model with its large constants as mere inputs: shape inference needs no values, and 2 GB do not serialise."""
    import onnx

    slim = onnx.ModelProto()
    slim.ir_version = max(model.ir_version, 4)
    slim.opset_import.extend(model.opset_import)
    slim.functions.extend(model.functions)
    slim.graph.name = model.graph.name
    slim.graph.node.extend(model.graph.node)
    slim.graph.output.extend(model.graph.output)
    slim.graph.value_info.extend(model.graph.value_info)
    large = [item for item in model.graph.initializer if math.prod(item.dims) > 1024 or item.data_location == 1]
    names = {item.name for item in large}
    slim.graph.initializer.extend(item for item in model.graph.initializer if item.name not in names)
    slim.graph.input.extend(item for item in model.graph.input if item.name not in names)
    slim.graph.input.extend(
        onnx.helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)) for item in large
    )
    return slim


def _cost(
    node: Any, stored: Mapping[str, Sequence[int]], made: Mapping[str, Any], elements: Mapping[str, int]
) -> float:
    """Return roughly how many multiplications a node takes; only ratios matter, and only for the shortlist."""
    out = sum(elements.get(name, 1) for name in node.output)
    if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul", "QLinearConv", "ConvInteger"):
        name = node.input[3] if node.op_type == "QLinearConv" else node.input[1]
        while name not in stored and name in made and made[name].input:
            name = made[name].input[0]  # a packed weight is unfolded by Cast, DequantizeLinear, Mul, …
        inner = stored.get(name, ())
        per_output = math.prod(inner[1:]) if node.op_type != "MatMul" and inner else (inner[0] if inner else 64)
        return float(out * max(per_output, 1))
    return float(out)
