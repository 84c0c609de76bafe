"""Cut an ONNX model into segments: one file per piece, every weight stored once, the chain equal to the whole."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cloud.split.graph import Flow, needs, ordered, tensor_types
from skills.errors import FormatError
from skills.files import sha256_file, sha256_hex, write_atomic
from skills.split import Image, Live, Segment, SharedData

# A constant used on both sides of a cut is written twice when it is small, and once, as external data, when it is not.
SMALL_BYTES = 1024
SHARED_FILE = "shared.bin"

Types = Mapping[str, tuple[int, tuple[int, ...]]]


@dataclasses.dataclass(frozen=True, slots=True)
class Pieces:
    """What `write_segments` wrote: the segments, their shared constants, and the live tensors at each end and cut."""

    segments: tuple[Segment, ...]
    shared: SharedData | None
    live: tuple[tuple[Live, ...], ...]
    outputs: tuple[Live, ...]


def write_segments(
    model: Any,
    flow: Flow,
    prefixes: Sequence[frozenset[int]],
    folder: Path,
    types: Types | None = None,
    image: Image | None = None,
    base: str = "segments",
) -> Pieces:
    """Write len(prefixes)+1 segment files to `folder`; each prefix must contain the one before it.

    Raises:
        FormatError: prefixes that are not nested or not closed, or a live tensor whose type cannot be inferred.
    """
    _check_nested(flow, prefixes)
    types = tensor_types(model) if types is None else types
    bounds = [frozenset[int](), *prefixes, frozenset(range(len(flow.ops)))]
    alive = [flow.live(prefix) for prefix in bounds[:-1]] + [flow.outputs]
    owners: dict[str, set[int]] = {}
    bodies = []
    for at, (before, upto) in enumerate(itertools.pairwise(bounds)):
        nodes = _with_constants(model, [flow.ops[op].index for op in sorted(upto - before)])
        bodies.append(nodes)
        for index in nodes:
            for name in needs(model.graph.node[index]):
                owners.setdefault(name, set()).add(at)
    large = [
        item for item in model.graph.initializer if len(owners.get(item.name, ())) > 1 and item.ByteSize() > SMALL_BYTES
    ]
    shared, places = _write_shared(large, folder, base)
    segments = []
    for at, nodes in enumerate(bodies):
        reads, gives = _ports(flow, bounds[at], bounds[at + 1], alive[at + 1])
        piece = _piece(model, nodes, reads, gives, types, places)
        data = piece.SerializeToString()
        name = f"{at}.onnx"
        write_atomic(folder / name, data)
        segments.append(Segment(f"{base}/{name}", sha256_hex(data), len(data), reads, gives))
    described = tuple(tuple(_live(name, types, flow, image) for name in names) for names in alive[:-1])
    return Pieces(tuple(segments), shared, described, tuple(_live(name, types, flow, None) for name in flow.outputs))


def _check_nested(flow: Flow, prefixes: Sequence[frozenset[int]]) -> None:
    producer = flow.producer()
    before: frozenset[int] = frozenset()
    for prefix in prefixes:
        if not before < prefix or len(prefix) >= len(flow.ops):
            raise FormatError(
                "the cuts must be nested, each with more nodes than the one before and fewer than the model"
            )
        for at in prefix:
            if any(producer.get(name, at) not in prefix for name in flow.ops[at].inputs):
                raise FormatError(f"a cut has node {flow.ops[at].kind} on the device and its producer behind the cut")
        before = prefix


def _with_constants(model: Any, indices: Iterable[int]) -> list[int]:
    """Return the nodes and, before them, the constant nodes that they read."""
    made = {name: at for at, node in enumerate(model.graph.node) for name in node.output}
    flowing = set(indices)
    found, todo = set(flowing), [name for index in flowing for name in needs(model.graph.node[index])]
    constant = _constant_nodes(model)
    while todo:
        at = made.get(todo.pop())
        if at is not None and at in constant and at not in found:
            found.add(at)
            todo += needs(model.graph.node[at])
    order = {index: place for place, index in enumerate(_topological(model))}
    return sorted(found, key=order.__getitem__)


def _topological(model: Any) -> list[int]:
    names = {item.name for item in [*model.graph.initializer, *model.graph.input]}
    return list(ordered(model.graph, names))


def _constant_nodes(model: Any) -> set[int]:
    initial = {item.name for item in model.graph.initializer}
    flowing = {item.name for item in model.graph.input if item.name not in initial}
    constant = set()
    for index in _topological(model):
        node = model.graph.node[index]
        if any(name in flowing for name in needs(node)):
            flowing |= set(node.output)
        else:
            constant.add(index)
    return constant


def _ports(
    flow: Flow, before: frozenset[int], upto: frozenset[int], alive_after: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    own = [flow.ops[at] for at in sorted(upto - before)]
    given = {name for op in own for name in op.outputs}
    reads = dict.fromkeys(name for op in own for name in op.inputs if name not in given)
    wanted = {
        *alive_after,
        *(name for at, op in enumerate(flow.ops) if at not in upto for name in op.inputs),
        *flow.outputs,
    }
    gives = dict.fromkeys(name for op in own for name in op.outputs if name in wanted)
    return tuple(reads), tuple(gives)


def _piece(
    model: Any,
    nodes: Sequence[int],
    reads: Sequence[str],
    gives: Sequence[str],
    types: Types,
    places: dict[str, tuple[int, int]],
) -> Any:
    import onnx

    piece = onnx.ModelProto()
    piece.ir_version = max(model.ir_version, 4)  # from 4 on, initializers need not be inputs
    piece.producer_name = "skerry"
    piece.opset_import.extend(model.opset_import)
    piece.functions.extend(model.functions)
    graph = piece.graph
    graph.name = model.graph.name or "segment"
    used = set()
    for index in nodes:
        node = model.graph.node[index]
        graph.node.append(node)
        used |= set(needs(node))
    for item in model.graph.initializer:
        if item.name not in used:
            continue
        if item.name in places:
            graph.initializer.append(_external(item, *places[item.name]))
        else:
            graph.initializer.append(item)
    graph.sparse_initializer.extend(item for item in model.graph.sparse_initializer if item.values.name in used)
    for target, names in ((graph.input, reads), (graph.output, gives)):
        for name in names:
            kind, shape = _typed(name, types)
            target.append(
                onnx.helper.make_tensor_value_info(name, kind, [None if size == -1 else size for size in shape])
            )
    for target, known in ((graph.input, model.graph.input), (graph.output, model.graph.output)):
        for at, item in enumerate(target):
            for original in known:
                if original.name == item.name:
                    target[at].CopyFrom(original)
    return piece


def _write_shared(
    large: Sequence[Any], folder: Path, base: str
) -> tuple[SharedData | None, dict[str, tuple[int, int]]]:
    if not large:
        return None, {}
    from onnx import numpy_helper

    blob, places = bytearray(), {}
    for item in large:
        raw = (
            item.raw_data
            if item.HasField("raw_data")
            else numpy_helper.from_array(numpy_helper.to_array(item)).raw_data
        )
        blob += b"\0" * (-len(blob) % 4096)  # onnxruntime maps external data by pages
        places[item.name] = (len(blob), len(raw))
        blob += raw
    write_atomic(folder / SHARED_FILE, bytes(blob))
    return SharedData(f"{base}/{SHARED_FILE}", sha256_file(folder / SHARED_FILE), len(blob)), places


def _external(item: Any, offset: int, length: int) -> Any:
    import onnx

    outside = onnx.TensorProto()
    outside.name, outside.data_type = item.name, item.data_type
    outside.dims.extend(item.dims)
    outside.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", SHARED_FILE), ("offset", str(offset)), ("length", str(length))):
        outside.external_data.add(key=key, value=value)
    return outside


def _typed(name: str, types: Types) -> tuple[int, tuple[int, ...]]:
    if name not in types:
        raise FormatError(f"the shape of the tensor {name!r} cannot be inferred, so no cut can lie there")
    kind, shape = types[name]
    return int(kind), shape


def _live(name: str, types: Types, flow: Flow, image: Image | None) -> Live:
    kind, shape = _typed(name, types)
    return Live(name, oip_name(kind), shape, image if name in flow.inputs and len(shape) == 4 else None)  # type: ignore[arg-type]


def oip_name(kind: int) -> str:
    """Return the Open Inference Protocol's word for an ONNX element type.

    Raises:
        FormatError: it has none (complex numbers, 8-bit floats, 4-bit integers).
    """
    from onnx import TensorProto

    names = {
        TensorProto.FLOAT: "FP32", TensorProto.DOUBLE: "FP64", TensorProto.FLOAT16: "FP16", TensorProto.UINT8: "UINT8",
        TensorProto.INT8: "INT8",
        TensorProto.UINT16: "UINT16", TensorProto.INT16: "INT16", TensorProto.INT32: "INT32", TensorProto.INT64: "INT64",
        TensorProto.UINT32: "UINT32", TensorProto.UINT64: "UINT64", TensorProto.BOOL: "BOOL",
    }  # fmt: skip
    if kind not in names:
        raise FormatError(f"a tensor of the ONNX element type {TensorProto.DataType.Name(kind)} cannot cross a cut")
    return names[kind]
