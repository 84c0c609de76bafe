"""One question to a skill: an Open Inference Protocol request in, checked arrays to the control code, a response out."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from skills import oip
from skills.errors import FormatError, SkerryError
from skills.manifest import Skill, Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

CONFIDENCE = "confidence"
MAX_REQUEST_BYTES = 512 << 20  # the endpoints have limits of their own


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What a run gave: all outputs, and where the models ran.

    `tail` is of split skills: why it cannot be asked, "" while it answers, None where this request does not tell.
    """

    outputs: "dict[str, NDArray[Any]]"
    where: str
    cut: str
    tail: str | None = None


def answer_request(
    skill: Skill, run: "Callable[[Arrays], Answer]", header: Mapping[str, Any], body: memoryview
) -> tuple[dict[str, object], bytes]:
    """Answer one request; returns the header for the supervisor and the response's body.

    Raises:
        FormatError: the request is not what it should be; the sentence is for the asker.
        SkerryError: the skill does not return what its manifest promises.
    """
    json_len = int(header["json_len"])
    call = oip.decode_call(body, None if json_len == len(body) else json_len, MAX_REQUEST_BYTES)
    check_inputs(skill, call.arrays)
    promised = [tensor.name for tensor in skill.outputs]
    if unknown := sorted(set(call.outputs) - set(promised)):
        raise FormatError(f"the request wants the output {unknown[0]!r}, {skill.name} has {', '.join(promised)}")
    answer = run(call.arrays)
    outputs = {
        tensor.name: checked_output(skill, tensor, answer.outputs)
        for tensor in skill.outputs
        if not call.outputs or tensor.name in call.outputs
    }
    data, size = oip.encode_answer(oip.Answer(outputs, skill.name, skill.version, call.id), binary=call.binary)
    reply: dict[str, object] = {"json_len": size, "where": answer.where, "cut": answer.cut}
    if answer.tail is not None:
        reply["tail"] = answer.tail
    if (confidence := _confidence(answer.outputs)) is not None:
        reply["confidence"] = confidence
    return reply, data


def check_inputs(skill: Skill, arrays: "Arrays") -> None:
    """Hold the arrays of a request against the manifest.

    Raises:
        FormatError: one is missing, unknown, or of another type or shape.
    """
    expected = {tensor.name: tensor for tensor in skill.inputs}
    if unknown := [name for name in arrays if name not in expected]:
        raise FormatError(f"the request has the input {unknown[0]!r}, {skill.name} takes {', '.join(expected)}")
    for name, tensor in expected.items():
        if name not in arrays:
            raise FormatError(f"the request lacks the input '{name}'")
        kind, shape = oip.datatype(arrays[name]), arrays[name].shape
        if kind != tensor.dtype or not fits(shape, tensor.shape):
            raise FormatError(
                f"input '{name}' is {kind} {list(shape)}, {skill.name} takes {tensor.dtype} {list(tensor.shape)}"
            )


def checked_output(skill: Skill, tensor: Tensor, outputs: "Arrays") -> "NDArray[Any]":
    """Return one output as the manifest promises it.

    Raises:
        SkerryError: the control code did not return it so.
    """
    import numpy as np

    if tensor.name not in outputs:
        raise SkerryError(f"{skill.name} returned no output '{tensor.name}'")
    array = np.asarray(outputs[tensor.name])
    kind = oip.datatype(array)
    if kind != tensor.dtype or not fits(array.shape, tensor.shape):
        raise SkerryError(
            f"{skill.name} returned '{tensor.name}' as {kind} {list(array.shape)}, "
            f"its manifest says {tensor.dtype} {list(tensor.shape)}"
        )
    return array


def fits(shape: tuple[int, ...], pattern: tuple[int, ...]) -> bool:
    """Tell whether a shape is what the manifest says, where -1 is a free size."""
    return len(shape) == len(pattern) and all(want in (-1, have) for have, want in zip(shape, pattern, strict=True))


def _confidence(outputs: "Arrays") -> float | None:
    import numpy as np

    if CONFIDENCE not in outputs:
        return None
    value = float(np.mean(np.asarray(outputs[CONFIDENCE], dtype=np.float64)))
    return round(value, 6) if math.isfinite(value) else None
