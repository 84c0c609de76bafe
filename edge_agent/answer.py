"""One question to a skill: an Open Inference Protocol request in, checked arrays to the control code, a response out.

REST form with the binary tensor extension: the first `json_len` bytes are JSON, tensors with a `binary_data_size` follow in
order. Specification: https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from skills.errors import FormatError, SkerryError
from skills.manifest import Datatype, Skill, Tensor
from skills.wire import Limits, decode_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

CONFIDENCE = "confidence"
MAX_JSON_BYTES = 64 << 20
NUMPY = {
    "BOOL": "?", "UINT8": "<u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "INT8": "<i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a run gave: all outputs, and where the models ran."""

    outputs: "dict[str, NDArray[Any]]"
    where: str
    cut: str


@dataclasses.dataclass(frozen=True, slots=True)
class RequestInput:
    """One tensor of a request."""

    name: str
    datatype: Datatype
    shape: Annotated[tuple[Annotated[int, Limits(min=0)], ...], Limits(max_items=8)]
    data: object = None
    parameters: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class RequestOutput:
    """An output that the asker wants."""

    name: str
    parameters: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """The JSON part of an inference request."""

    inputs: Annotated[tuple[RequestInput, ...], Limits(min=1, max_items=32)]
    outputs: tuple[RequestOutput, ...] = ()
    id: Annotated[str, Limits(max_items=256)] = ""
    parameters: Mapping[str, object] = dataclasses.field(default_factory=dict)


def answer_request(
    skill: Skill, run: "Callable[[Arrays], Answer]", header: Mapping[str, Any], body: memoryview
) -> tuple[dict[str, object], bytes]:
    """Answer one request; returns the header for the supervisor and the response's body.

    Raises:
        FormatError: the request is not what it should be; the sentence is for the asker.
        SkerryError: the skill does not return what its manifest promises.
    """
    json_len = int(header["json_len"])
    request = decode_json(Request, bytes(body[:json_len]), "the request", MAX_JSON_BYTES)
    answer = run(read_inputs(request, body[json_len:], skill.inputs))
    wanted = {output.name: output for output in request.outputs}
    promised = [tensor.name for tensor in skill.outputs]
    if unknown := sorted(set(wanted) - set(promised)):
        raise FormatError(f"the request wants the output {unknown[0]!r}, {skill.name} has {', '.join(promised)}")
    all_binary = request.parameters.get("binary_data_output") is True
    outputs: list[dict[str, object]] = []
    pieces: list[bytes] = []
    for tensor in skill.outputs:
        if wanted and tensor.name not in wanted:
            continue
        array = checked_output(skill, tensor, answer.outputs)
        entry: dict[str, object] = {"name": tensor.name, "datatype": tensor.dtype, "shape": list(array.shape)}
        asked = wanted[tensor.name].parameters.get("binary_data") if tensor.name in wanted else None
        if tensor.dtype != "BYTES" and (asked is True or (asked is None and all_binary)):
            raw = array.astype(NUMPY[tensor.dtype], copy=False).tobytes()
            entry["parameters"] = {"binary_data_size": len(raw)}
            pieces.append(raw)
        else:
            entry["data"] = _plain(array)
        outputs.append(entry)
    response: dict[str, object] = {"model_name": skill.name, "model_version": skill.version, "outputs": outputs}
    if request.id:
        response["id"] = request.id
    text = json.dumps(response, separators=(",", ":")).encode()
    reply: dict[str, object] = {"json_len": len(text), "where": answer.where, "cut": answer.cut}
    if (confidence := _confidence(answer.outputs)) is not None:
        reply["confidence"] = confidence
    return reply, b"".join((text, *pieces))


def read_inputs(request: Request, binary: memoryview, tensors: tuple[Tensor, ...]) -> "dict[str, NDArray[Any]]":
    """Return the arrays of a request, checked against what the skill takes.

    Raises:
        FormatError: a tensor is missing, unknown, of another type or shape, or does not fit its bytes.
    """
    expected = {tensor.name: tensor for tensor in tensors}
    arrays: dict[str, NDArray[Any]] = {}
    at = 0
    for given in request.inputs:
        tensor = expected.get(given.name)
        if tensor is None or given.name in arrays:
            names = ", ".join(expected)
            raise FormatError(f"the request has the input {given.name!r} (too much or twice), expected {names}")
        if given.datatype != tensor.dtype or not fits(given.shape, tensor.shape):
            raise FormatError(
                f"input '{given.name}' is {given.datatype} {list(given.shape)}, expected {tensor.dtype} {list(tensor.shape)}"
            )
        size = given.parameters.get("binary_data_size")
        if size is None:
            arrays[given.name] = _from_json(given)
            continue
        if not isinstance(size, int) or isinstance(size, bool) or size < 0 or at + size > len(binary):
            raise FormatError(f"input '{given.name}' announces {size!r} binary bytes, {len(binary) - at} are left")
        arrays[given.name] = _from_binary(given, binary[at : at + size])
        at += size
    if at != len(binary):
        raise FormatError(f"{len(binary) - at} bytes follow the last tensor")
    if missing := [name for name in expected if name not in arrays]:
        raise FormatError(f"the request lacks the input '{missing[0]}'")
    return arrays


def checked_output(skill: Skill, tensor: Tensor, outputs: "Arrays") -> "NDArray[Any]":
    """Return one output as the manifest promises it.

    Raises:
        SkerryError: the control code did not return it so.
    """
    import numpy as np

    if tensor.name not in outputs:
        raise SkerryError(f"{skill.name} returned no output '{tensor.name}'")
    array = np.asarray(outputs[tensor.name])
    if tensor.dtype != "BYTES" and array.dtype != np.dtype(NUMPY[tensor.dtype]):
        raise SkerryError(f"{skill.name} returned '{tensor.name}' as {array.dtype}, its manifest says {tensor.dtype}")
    if not fits(array.shape, tensor.shape):
        raise SkerryError(
            f"{skill.name} returned '{tensor.name}' of shape {list(array.shape)}, its manifest says {list(tensor.shape)}"
        )
    return array


def fits(shape: tuple[int, ...], pattern: tuple[int, ...]) -> bool:
    """Tell whether a shape is what the manifest says, where -1 is a free size."""
    return len(shape) == len(pattern) and all(want in (-1, have) for have, want in zip(shape, pattern, strict=True))


def _from_json(given: RequestInput) -> "NDArray[Any]":
    import numpy as np

    if given.data is None:
        raise FormatError(f"input '{given.name}' has neither data nor binary_data_size")
    if given.datatype == "BYTES":
        flat = _flat(given.data)
        if not all(isinstance(item, str) for item in flat):
            raise FormatError(f"input '{given.name}' is BYTES, its data must be texts")
        array = np.array([str(item).encode() for item in flat], dtype=object)
    else:
        try:
            array = np.asarray(given.data)
            if array.dtype.kind not in "biuf":
                raise ValueError("not numbers")
            kind = np.dtype(NUMPY[given.datatype])
            if kind.kind in "biu" and array.size and not np.array_equal(array, array.astype(kind)):
                raise ValueError(f"out of the range of {given.datatype}")
            array = array.astype(kind)
        except (ValueError, TypeError, OverflowError) as error:
            raise FormatError(f"the data of input '{given.name}' is not {given.datatype}: {error}") from None
    if array.size != math.prod(given.shape):
        raise FormatError(f"input '{given.name}' has {array.size} values for the shape {list(given.shape)}")
    return array.reshape(given.shape)


def _from_binary(given: RequestInput, raw: memoryview) -> "NDArray[Any]":
    import numpy as np

    count = math.prod(given.shape)
    if given.datatype == "BYTES":
        items, at = [], 0
        while at + 4 <= len(raw):
            size = int.from_bytes(raw[at : at + 4], "little")
            items.append(bytes(raw[at + 4 : at + 4 + size]))
            at += 4 + size
        if at != len(raw) or len(items) != count:
            raise FormatError(f"input '{given.name}' does not hold {count} byte strings")
        return np.array(items, dtype=object).reshape(given.shape)
    kind = np.dtype(NUMPY[given.datatype])
    if len(raw) != count * kind.itemsize:
        raise FormatError(
            f"input '{given.name}' has {len(raw)} bytes, {given.datatype} {list(given.shape)} takes {count * kind.itemsize}"
        )
    return np.frombuffer(raw, dtype=kind).reshape(given.shape).copy()


def _flat(data: object) -> list[object]:
    if not isinstance(data, (list, tuple)):
        return [data]
    return [item for entry in data for item in (_flat(entry) if isinstance(entry, (list, tuple)) else [entry])]


def _plain(array: "NDArray[Any]") -> list[object]:
    if array.dtype == object:
        return [item.decode(errors="replace") if isinstance(item, bytes) else str(item) for item in array.ravel()]
    # JSON knows neither NaN nor infinity; null is what strict parsers accept.
    if array.dtype.kind == "f":
        return [item if math.isfinite(item) else None for item in array.ravel().tolist()]
    flat: list[object] = array.ravel().tolist()
    return flat


def _confidence(outputs: "Arrays") -> float | None:
    import numpy as np

    if CONFIDENCE not in outputs:
        return None
    value = float(np.mean(np.asarray(outputs[CONFIDENCE], dtype=np.float64)))
    return round(value, 6) if math.isfinite(value) else None
