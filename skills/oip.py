"""The only door to the Open Inference Protocol v2: its gRPC messages and its REST form with the binary-tensor extension.

Both sides meet in `Call` and `Answer`: named arrays and parameters. Tensors travel raw; JSON lists are read and, on wish,
written. Specification: kserve/open-inference-protocol; the binary extension is Triton's `extension_binary_data`.
numpy, grpc and protobuf come in with the first call.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from skills.errors import FormatError, MissingExtra

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from skills import oip_pb2

    Array = NDArray[Any]

MAX_MESSAGE_BYTES = 16 << 20
MAX_JSON_BYTES = 4 << 20
MAX_TENSORS = 64
MAX_DIMS = 8
MAX_PARAMETERS = 64
MAX_NAME = 512
OBJECT_BYTES = 64  # that an element of BYTES takes in an array, beside its own
MAX_VALUES = 1 << 40
BINARY_HEADER = "Inference-Header-Content-Length"
DTYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
    "BYTES": "object",
}  # fmt: skip
CONTENTS = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip

Parameter = bool | int | float | str


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """A request: arrays by name, and what was said beside them."""

    arrays: "Mapping[str, Array]"
    id: str = ""
    parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)
    outputs: tuple[str, ...] = ()  # the ones asked for; empty: all
    binary: bool = True  # the caller wants its answer's tensors raw


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A response: arrays by name, and which model gave them."""

    arrays: "Mapping[str, Array]"
    model: str = ""
    version: str = ""
    id: str = ""
    parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)


# --- REST ------------------------------------------------------------------------------------------------------------------


def encode_call(call: Call) -> tuple[bytes, int]:
    """Return the body of a REST request and the length of its JSON part (send it as `Inference-Header-Content-Length`)."""
    head: dict[str, Any] = {"inputs": []}
    if call.id:
        head["id"] = call.id
    if call.parameters or call.binary:
        head["parameters"] = {**call.parameters, **({"binary_data_output": True} if call.binary else {})}
    if call.outputs:
        head["outputs"] = [{"name": name} for name in call.outputs]
    return _encode(head, "inputs", call.arrays, binary=True)


def encode_answer(answer: Answer, binary: bool = True) -> tuple[bytes, int]:
    """Return the body of a REST response and the length of its JSON part."""
    head: dict[str, Any] = {"model_name": answer.model, "outputs": []}
    head |= {key: value for key, value in (("model_version", answer.version), ("id", answer.id)) if value}
    if answer.parameters:
        head["parameters"] = dict(answer.parameters)
    return _encode(head, "outputs", answer.arrays, binary=binary)


def decode_call(body: bytes | memoryview, json_len: int | None = None, max_bytes: int = MAX_MESSAGE_BYTES) -> Call:
    """Read the body of a REST request; `json_len` is the header's number, None when there was none (all JSON).

    Raises:
        FormatError: too large, or anything that does not follow the protocol.
    """
    head, rest = _split_body(body, json_len, max_bytes)
    parameters = _parameters(head.get("parameters", {}))
    outputs = head.get("outputs", [])
    if not isinstance(outputs, list) or not all(
        isinstance(one, dict) and isinstance(one.get("name"), str) for one in outputs
    ):
        raise FormatError("the request's 'outputs' is no list of objects with a name")
    each = [one.get("parameters") for one in outputs]
    binary = bool(parameters.get("binary_data_output")) or any(
        isinstance(one, dict) and one.get("binary_data") is True for one in each
    )
    kept = {key: value for key, value in parameters.items() if key != "binary_data_output"}
    return Call(
        _decode_arrays(head, "inputs", rest), _text(head, "id"), kept, tuple(one["name"] for one in outputs), binary
    )


def decode_answer(body: bytes | memoryview, json_len: int | None = None, max_bytes: int = MAX_MESSAGE_BYTES) -> Answer:
    """Read the body of a REST response.

    Raises:
        FormatError: too large, or anything that does not follow the protocol.
    """
    head, rest = _split_body(body, json_len, max_bytes)
    arrays = _decode_arrays(head, "outputs", rest)
    return Answer(
        arrays,
        _text(head, "model_name"),
        _text(head, "model_version"),
        _text(head, "id"),
        _parameters(head.get("parameters", {})),
    )


def _encode(head: dict[str, Any], key: str, arrays: "Mapping[str, Array]", *, binary: bool) -> tuple[bytes, int]:
    parts: list[bytes] = []
    for name, array in arrays.items():
        entry: dict[str, Any] = {"name": name, "datatype": datatype(array), "shape": list(array.shape)}
        if binary:
            raw = to_raw(array)
            entry["parameters"] = {"binary_data_size": len(raw)}
            parts.append(raw)
        else:
            entry["data"] = _listed(array)
        head[key].append(entry)
    text = json.dumps(head, separators=(",", ":"), allow_nan=True).encode()
    return b"".join((text, *parts)), len(text)


def _split_body(body: bytes | memoryview, json_len: int | None, max_bytes: int) -> tuple[dict[str, Any], memoryview]:
    view = memoryview(body)
    if len(view) > max_bytes:
        raise FormatError(f"the body has {len(view)} bytes, the limit is {max_bytes}")
    length = len(view) if json_len is None else json_len
    if not 0 < length <= len(view) or (json_len is not None and length > MAX_JSON_BYTES):
        raise FormatError(f"the JSON part is said to have {length} bytes of {len(view)}")
    try:
        head = json.loads(bytes(view[:length]))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the body is not JSON: {error}") from None
    if not isinstance(head, dict):
        raise FormatError("the body is not a JSON object")
    return head, view[length:]


def _decode_arrays(head: dict[str, Any], key: str, rest: memoryview) -> "dict[str, Array]":
    entries = head.get(key)
    if not isinstance(entries, list) or not 0 < len(entries) <= MAX_TENSORS:
        raise FormatError(f"the body needs a list {key!r} of 1 to {MAX_TENSORS} tensors")
    arrays: dict[str, Array] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or entry["name"] in arrays:
            raise FormatError(f"every tensor in {key!r} is an object with a name of its own")
        shape, size = _shape(entry["name"], entry.get("shape")), _binary_size(entry)
        kind = _datatype(entry["name"], entry.get("datatype"))
        if size is not None:
            if size > len(rest):
                raise FormatError(f"the tensor {entry['name']!r} announces {size} raw bytes, {len(rest)} are left")
            arrays[entry["name"]] = from_raw(entry["name"], kind, shape, rest[:size])
            rest = rest[size:]
        else:
            arrays[entry["name"]] = _from_list(entry["name"], kind, shape, entry.get("data"))
    if len(rest):
        raise FormatError(f"the body has {len(rest)} bytes behind its last tensor")
    return arrays


def _binary_size(entry: dict[str, Any]) -> int | None:
    parameters = entry.get("parameters", {})
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is None:
        return None
    if type(size) is not int or size < 0 or "data" in entry:
        raise FormatError(f"the tensor {entry['name']!r} has a binary_data_size of {size!r}, or data beside it")
    return size


def _from_list(name: str, kind: str, shape: tuple[int, ...], data: Any) -> "Array":
    import numpy as np

    if not isinstance(data, list):
        raise FormatError(f"the tensor {name!r} has neither 'data' nor a binary_data_size")
    flat = _flattened(data)
    if len(flat) != math.prod(shape):
        raise FormatError(
            f"the tensor {name!r} has {len(flat)} values, its shape {list(shape)} needs {math.prod(shape)}"
        )
    right: tuple[type, ...] = {"BOOL": (bool,), "BYTES": (str,)}.get(
        kind, (int, float) if kind.startswith("FP") else (int,)
    )
    if not all(isinstance(item, right) and (bool in right or not isinstance(item, bool)) for item in flat):
        raise FormatError(f"the tensor {name!r} is {kind} and has a value of another kind")
    if kind == "BYTES":
        made = np.empty(len(flat), object)
        made[:] = [item.encode() for item in flat]
        return made.reshape(shape)
    try:
        return np.array(flat, DTYPES[kind]).reshape(shape)
    except (OverflowError, ValueError) as error:
        raise FormatError(f"the tensor {name!r} has a value that {kind} does not hold: {error}") from None


def _flattened(data: list[Any]) -> list[Any]:
    """Return nested lists flat, in order, without recursion."""
    flat: list[Any] = []
    todo: list[Any] = list(reversed(data))
    while todo:
        item = todo.pop()
        if isinstance(item, list):
            todo.extend(reversed(item))
        else:
            flat.append(item)
    return flat


def _listed(array: "Array") -> list[Any]:
    if array.dtype == object:
        return [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in array.ravel()]
    return list(array.ravel().tolist())


def _parameters(raw: Any) -> dict[str, Parameter]:
    if not isinstance(raw, dict) or not all(isinstance(value, (bool, int, float, str)) for value in raw.values()):
        raise FormatError("'parameters' is no object of booleans, numbers and texts")
    return dict(raw)


def _text(head: dict[str, Any], key: str) -> str:
    value = head.get(key, "")
    if not isinstance(value, str) or len(value) > 512:
        raise FormatError(f"{key!r} is no text of at most 512 characters")
    return value


# --- arrays ----------------------------------------------------------------------------------------------------------------


def datatype(array: "Array") -> str:
    """Return the protocol's word for an array's type.

    Raises:
        FormatError: it has none.
    """
    if array.dtype.kind in "SU":
        return "BYTES"
    for name, dtype in DTYPES.items():
        if array.dtype == dtype:
            return name
    raise FormatError(f"arrays of {array.dtype} have no word in the inference protocol")


def to_raw(array: "Array") -> bytes:
    """Return an array as the protocol sends it: row-major little-endian, BYTES with a u32 length before each element."""
    import numpy as np

    if array.dtype.kind in "OSU":
        items = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()]
        return b"".join(struct.pack("<I", len(item)) + item for item in items)
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def from_raw(name: str, kind: str, shape: Sequence[int], raw: bytes | bytearray | memoryview) -> "Array":
    """Return the array that `to_raw` wrote; its memory is that of `raw`, and read-only where that is.

    Raises:
        FormatError: the bytes do not fit type and shape.
    """
    import numpy as np

    kind, shape = _datatype(name, kind), _shape(name, list(shape))
    count = math.prod(shape)
    if kind == "BYTES":
        return _bytes_array(name, count, memoryview(raw)).reshape(shape)
    dtype = np.dtype(DTYPES[kind]).newbyteorder("<")
    if len(raw) != count * dtype.itemsize:
        raise FormatError(
            f"the tensor {name!r} has {len(raw)} bytes, {kind} {list(shape)} needs {count * dtype.itemsize}"
        )
    if kind == "BOOL" and count and np.frombuffer(raw, np.uint8).max() > 1:
        raise FormatError(f"the tensor {name!r} is BOOL and holds other bytes than 0 and 1")
    return np.frombuffer(raw, dtype).reshape(shape)


def _bytes_array(name: str, count: int, raw: memoryview) -> "Array":
    import numpy as np

    if count * 4 > len(raw):
        raise FormatError(f"the tensor {name!r} has {len(raw)} bytes, too few for {count} elements")
    items, at = np.empty(count, object), 0
    for index in range(count):
        length = struct.unpack_from("<I", raw, at)[0] if len(raw) >= at + 4 else len(raw)
        if at + 4 + length > len(raw):
            raise FormatError(f"the tensor {name!r} is cut short at element {index}")
        items[index] = bytes(raw[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(raw):
        raise FormatError(f"the tensor {name!r} has {len(raw) - at} bytes behind its last element")
    return items


def _shape(name: str, raw: Any) -> tuple[int, ...]:
    if (
        not isinstance(raw, (list, tuple))
        or len(raw) > MAX_DIMS
        or not all(type(size) is int and 0 <= size < 1 << 31 for size in raw)
        or math.prod(max(size, 1) for size in raw) > MAX_VALUES  # numpy refuses that even where a size is 0
    ):
        raise FormatError(f"the tensor {name!r} has no shape of at most {MAX_DIMS} whole numbers")
    return tuple(raw)


def _datatype(name: str, kind: Any) -> str:
    if not isinstance(kind, str) or kind not in DTYPES:
        raise FormatError(f"the tensor {name!r} is {kind!r}, known are {', '.join(DTYPES)}")
    return kind


# --- gRPC ------------------------------------------------------------------------------------------------------------------


def messages() -> Any:
    """Return the generated message classes.

    Raises:
        MissingExtra: protobuf is not installed.
    """
    try:
        from skills import oip_pb2
    except ImportError:
        raise MissingExtra("protobuf is not installed: pip install 'skerry[edge]'") from None
    return oip_pb2


def service() -> Any:
    """Return the generated service: `GRPCInferenceServiceStub`, `…Servicer`, `add_…Servicer_to_server`.

    Raises:
        MissingExtra: grpcio is not installed.
    """
    try:
        from skills import oip_pb2_grpc
    except ImportError:
        raise MissingExtra("grpcio is not installed: pip install 'skerry[edge]'") from None
    return oip_pb2_grpc


def to_request(model: str, call: Call) -> "oip_pb2.ModelInferRequest":
    """Return the gRPC request for `call`, tensors raw."""
    pb = messages()
    request = pb.ModelInferRequest(model_name=model, id=call.id)
    for name, array in call.arrays.items():
        request.inputs.add(name=name, datatype=datatype(array), shape=array.shape)
        request.raw_input_contents.append(to_raw(array))
    for name in call.outputs:
        request.outputs.add(name=name)
    _put_parameters(request.parameters, call.parameters)
    return request  # type: ignore[no-any-return]


def from_request(request: "oip_pb2.ModelInferRequest") -> Call:
    """Read a gRPC request.

    Raises:
        FormatError: tensors that do not fit their types and shapes, or more of something than may be.
    """
    said = parameters(request)
    if len(request.outputs) > MAX_TENSORS:
        raise FormatError(f"a request asks for {len(request.outputs)} outputs, allowed are {MAX_TENSORS}")
    arrays = _arrays(request.inputs, request.raw_input_contents)
    return Call(arrays, request.id, said, tuple(output.name for output in request.outputs))


def parameters(message: "oip_pb2.ModelInferRequest | oip_pb2.ModelInferResponse") -> dict[str, Parameter]:
    """Return what a message says beside its tensors, which are not looked at.

    Raises:
        FormatError: it says more than may be.
    """
    if len(message.parameters) > MAX_PARAMETERS:
        raise FormatError(f"a message has {len(message.parameters)} parameters, allowed are {MAX_PARAMETERS}")
    found: dict[str, Parameter] = {}
    for key, value in message.parameters.items():
        kind = value.WhichOneof("parameter_choice")
        if kind is not None:
            found[key] = getattr(value, kind)
    return found


def unpacked_bytes(request: "oip_pb2.ModelInferRequest") -> int:
    """Return how much memory `from_request` takes at most beside the message itself, of which nothing is unpacked for it."""
    total, raw = 0, len(request.raw_input_contents) > 0
    for tensor in request.inputs[:MAX_TENSORS]:
        kind = tensor.datatype
        if kind in CONTENTS and not raw:
            size = OBJECT_BYTES if kind == "BYTES" else 8
            total += size * len(getattr(tensor.contents, CONTENTS[kind]))
        elif kind == "BYTES":  # each element has its length before it
            total += OBJECT_BYTES * max(0, min(math.prod(tensor.shape[:MAX_DIMS]), request.ByteSize() // 4))
    return total


def to_response(answer: Answer) -> "oip_pb2.ModelInferResponse":
    """Return the gRPC response for `answer`, tensors raw."""
    pb = messages()
    response = pb.ModelInferResponse(model_name=answer.model, model_version=answer.version, id=answer.id)
    for name, array in answer.arrays.items():
        response.outputs.add(name=name, datatype=datatype(array), shape=array.shape)
        response.raw_output_contents.append(to_raw(array))
    _put_parameters(response.parameters, answer.parameters)
    return response  # type: ignore[no-any-return]


def from_response(response: "oip_pb2.ModelInferResponse") -> Answer:
    """Read a gRPC response.

    Raises:
        FormatError: tensors that do not fit their types and shapes.
    """
    arrays = _arrays(response.outputs, response.raw_output_contents)
    return Answer(arrays, response.model_name, response.model_version, response.id, parameters(response))


def _arrays(tensors: Any, raw: Any) -> "dict[str, Array]":
    import numpy as np

    if len(tensors) > MAX_TENSORS or len({tensor.name for tensor in tensors}) != len(tensors):
        raise FormatError(f"a message carries {len(tensors)} tensors, allowed are {MAX_TENSORS} with a name each")
    if raw and len(raw) != len(tensors):
        raise FormatError(f"a message has {len(raw)} raw contents for {len(tensors)} tensors")
    arrays: dict[str, Array] = {}
    for at, tensor in enumerate(tensors):
        if len(tensor.name) > MAX_NAME or len(tensor.datatype) > MAX_NAME:
            raise FormatError(f"a tensor's name or type has more than {MAX_NAME} characters")
        kind, shape = _datatype(tensor.name, tensor.datatype), _shape(tensor.name, tensor.shape[: MAX_DIMS + 1])
        if raw:
            arrays[tensor.name] = from_raw(tensor.name, kind, shape, raw[at])
            continue
        if kind not in CONTENTS:
            raise FormatError(f"the tensor {tensor.name!r} is {kind}, which travels raw only")
        values, count = getattr(tensor.contents, CONTENTS[kind]), math.prod(shape)
        if len(values) != count:
            raise FormatError(f"the tensor {tensor.name!r} has {len(values)} values, its shape needs {count}")
        try:
            array = np.fromiter(values, DTYPES[kind], count)
        except (OverflowError, ValueError) as error:
            raise FormatError(f"the tensor {tensor.name!r} has a value that {kind} does not hold: {error}") from None
        arrays[tensor.name] = array.reshape(shape)
    return arrays


def _put_parameters(target: Any, parameters: Mapping[str, Parameter]) -> None:
    for key, value in parameters.items():
        if isinstance(value, bool):
            target[key].bool_param = value
        elif isinstance(value, int):
            target[key].int64_param = value
        else:
            target[key].string_param = str(value)  # the common InferParameter has no floating point
