"""Cut an ONNX model into segments: one file per piece, every weight stored once, the chain equal to the whole."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from cloud.split.graph import Flow, needs, ordered, tensor_types
from skills.coding import Image, Live
from skills.errors import FormatError
from skills.files import sha256_file, sha256_hex, write_atomic, write_atomic_pieces
from skills.split_plan import Segment, SharedData

# A constant used on both sides of a cut is written twice when it is small, and once, as external data, when it is not.
SMALL_BYTES = 1024
# A segment with more constants than this keeps them as external data: one protobuf holds at most 2 GiB.
INLINE_BYTES = 1 << 30
COPY_BYTES = 16 << 20
PAGE_BYTES = 4096  # onnxruntime maps external data by pages
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
    names: Sequence[str] = (),
    shared_name: str = SHARED_FILE,
    source: Path | None = None,
) -> Pieces:
    """Write len(prefixes)+1 segment files to `folder`; each prefix must contain the one before it.

    The files are called 0.onnx, 1.onnx, … unless `names` says otherwise. `source` is where the model's external data lies:
    it is copied piece by piece and never held in memory as a whole.

    Raises:
        FormatError: prefixes that are not nested or not closed, or a live tensor whose type cannot be inferred.
    """
    _check_nested(flow, prefixes)
    types = tensor_types(model) if types is None else types
    bounds = [frozenset[int](), *prefixes, frozenset(range(len(flow.ops)))]
    alive = [flow.live(prefix) for prefix in bounds[:-1]] + [flow.outputs]
    makers, order = _constant_nodes(model)
    stored = {item.name: Constant(item, source) for item in model.graph.initializer}
    bodies, owners = [], dict[str, set[int]]()
    for at, (before, upto) in enumerate(itertools.pairwise(bounds)):
        nodes = _with_constants(model, [flow.ops[op].index for op in sorted(upto - before)], makers, order)
        bodies.append(nodes)
        for index in nodes:
            for name in needs(model.graph.node[index]):
                owners.setdefault(name, set()).add(at)
    shared, places = _write_shared(_outside(stored, owners, len(bodies)), folder, base, shared_name)
    segments = []
    for at, nodes in enumerate(bodies):
        reads, gives = _ports(flow, bounds[at], bounds[at + 1], alive[at + 1])
        piece = _piece(model, nodes, reads, gives, types, stored, places)
        data = piece.SerializeToString()
        name = names[at] if names else f"{at}.onnx"
        write_atomic(folder / name, data)
        segments.append(Segment(f"{base}/{name}", sha256_hex(data), len(data), reads, gives))
    described = tuple(tuple(_live(name, types, flow, image) for name in names_) for names_ in alive[:-1])
    return Pieces(tuple(segments), shared, described, tuple(_live(name, types, flow, None) for name in flow.outputs))


def join(files: Sequence[Path], outputs: Sequence[str]) -> Any:
    """Return consecutive segments as one model again; `outputs` are the whole model's, of which it gives those it makes.

    The runtime then fuses and lays out across the cuts. External data stays where it is, beside the files.

    Raises:
        FormatError: a file is no ONNX model.
    """
    import onnx

    whole = onnx.ModelProto()
    made: set[str] = set()
    for file in files:
        try:
            piece = onnx.load(file, load_external_data=False)
        except Exception as error:
            raise FormatError(f"{file.name} is no ONNX model: {error}") from error
        graph = piece.graph
        if not made:
            whole.CopyFrom(piece)
            del whole.graph.output[:]
        else:
            known = {item.name for item in whole.graph.initializer}
            known |= {item.values.name for item in whole.graph.sparse_initializer}
            # What several segments need of constants each of them has.
            whole.graph.initializer.extend(item for item in graph.initializer if item.name not in known)
            whole.graph.sparse_initializer.extend(
                item for item in graph.sparse_initializer if item.values.name not in known
            )
            whole.graph.node.extend(node for node in graph.node if node.output[0] not in made)
            fed = {item.name for item in whole.graph.input}
            whole.graph.input.extend(item for item in graph.input if item.name not in made and item.name not in fed)
        whole.graph.output.extend(item for item in graph.output if item.name in outputs)
        made |= {name for node in graph.node for name in node.output}
    return whole


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """An initializer, and where its bytes lie when they are not in the model's own file."""

    item: Any
    source: Path | None

    @property
    def outside(self) -> bool:
        """Whether the bytes lie in a file beside the model."""
        return int(self.item.data_location) == 1

    @property
    def size(self) -> int:
        """How many bytes the values take."""
        return (
            int(self.item.ByteSize()) if not self.outside else int(self._reference().get("length") or self._computed())
        )

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes as ONNX stores them raw, a few MiB at once."""
        from onnx import numpy_helper

        if not self.outside:
            raw = self.item.raw_data
            yield (
                raw
                if self.item.HasField("raw_data")
                else numpy_helper.from_array(numpy_helper.to_array(self.item)).raw_data
            )
            return
        reference = self._reference()
        name, left = str(reference.get("location", "")), self.size
        file = (self.source or Path()) / name
        if self.source is None or not file.resolve().is_relative_to(self.source.resolve()):
            raise FormatError(f"the constant {self.item.name!r} lies in {name!r}, which is not beside the model")
        if not file.is_file() or file.stat().st_size < int(reference.get("offset") or 0) + left:
            raise FormatError(f"the constant {self.item.name!r} lies in {name!r}, which is missing or too short")
        with file.open("rb") as data:
            data.seek(int(reference.get("offset") or 0))
            while left > 0:
                piece = data.read(min(COPY_BYTES, left))
                left -= len(piece)
                yield piece

    def inline(self) -> Any:
        """Return the initializer with its values in it."""
        if not self.outside:
            return self.item
        inside = type(self.item)()
        inside.name, inside.data_type = self.item.name, self.item.data_type
        inside.dims.extend(self.item.dims)
        inside.raw_data = b"".join(self.pieces())
        return inside

    def _reference(self) -> dict[str, str]:
        return {entry.key: entry.value for entry in self.item.external_data}

    def _computed(self) -> int:
        from onnx import helper

        count = math.prod(self.item.dims)
        if self.item.data_type in (21, 22, 23):  # INT4, UINT4, FLOAT4: two in a byte
            return int((count + 1) // 2)
        return int(count) * int(helper.tensor_dtype_to_np_dtype(self.item.data_type).itemsize)


def _outside(stored: Mapping[str, Constant], owners: Mapping[str, set[int]], count: int) -> list[Constant]:
    """Return the constants that are written to the file beside the segments: those of several, and those of a very large one."""
    mine = [
        sum(one.size for name, one in stored.items() if at in owners.get(name, ())) > INLINE_BYTES
        for at in range(count)
    ]
    return [
        one
        for name, one in stored.items()
        if one.size > SMALL_BYTES and (len(owners.get(name, ())) > 1 or any(mine[at] for at in owners.get(name, ())))
    ]


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


def _with_constants(
    model: Any, indices: Iterable[int], constant: AbstractSet[int], order: Mapping[int, int]
) -> list[int]:
    """Return the nodes and, before them, the constant nodes that they read."""
    made = {name: at for at in constant for name in model.graph.node[at].output}
    flowing = set(indices)
    found, todo = set(flowing), [name for index in flowing for name in needs(model.graph.node[index])]
    while todo:
        at = made.get(todo.pop())
        if at is not None and at not in found:
            found.add(at)
            todo += needs(model.graph.node[at])
    return sorted(found, key=order.__getitem__)


def _constant_nodes(model: Any) -> tuple[set[int], dict[int, int]]:
    """Return the nodes that depend on no input, and the place of every node in an order that works."""
    graph = model.graph
    initial = {item.name for item in graph.initializer} | {item.values.name for item in graph.sparse_initializer}
    flowing = {item.name for item in graph.input if item.name not in initial}
    constant, order = set(), {}
    for place, index in enumerate(ordered(graph, initial | flowing)):
        node = graph.node[index]
        order[index] = place
        if any(name in flowing for name in needs(node)):
            flowing |= set(node.output)
        else:
            constant.add(index)
    return constant, order


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
    stored: Mapping[str, Constant],
    places: Mapping[str, tuple[str, int, int]],
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
            graph.initializer.append(stored[item.name].inline())
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
    large: Sequence[Constant], folder: Path, base: str, name: str
) -> tuple[SharedData | None, dict[str, tuple[str, int, int]]]:
    if not large:
        return None, {}
    places: dict[str, tuple[str, int, int]] = {}

    def pieces() -> Iterator[bytes]:
        at = 0
        for one in large:
            padding = -at % PAGE_BYTES
            yield b"\0" * padding
            at += padding
            start = at
            for piece in one.pieces():
                at += len(piece)
                yield piece
            places[one.item.name] = (name, start, at - start)

    write_atomic_pieces(folder / name, pieces())
    return SharedData(f"{base}/{name}", sha256_file(folder / name), (folder / name).stat().st_size), places


def _external(item: Any, file: str, offset: int, length: int) -> Any:
    import onnx

    outside = onnx.TensorProto()
    outside.name, outside.data_type = item.name, item.data_type
    outside.dims.extend(item.dims)
    outside.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", str(offset)), ("length", str(length))):
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
