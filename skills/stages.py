"""The stages of a skill as a chain that runs in two rooms: typed messages between them, and what a plan of them must be.

A stage's message is what it returns: arrays by name. `split.yaml` says which, of which type; what comes from the other room,
or goes there, is held against that, and so is every file that a stage is made of.
"""

import dataclasses
import importlib.abc
import importlib.machinery
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skills.codec import DTYPES
from skills.coding import Live
from skills.errors import FormatError, TrustError
from skills.files import sha256_hex
from skills.manifest import Skill, Tensor
from skills.split_plan import Plan, Segment, StagePart
from skills.timer import Halt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]
    StageFunction = Callable[[Arrays, Any], Arrays]

MAX_MESSAGE_BYTES = 64 << 20
RUNTIME = "onnxruntime"  # what a tail runs the models of stages with
AGAIN = "plan again (skerry split stages)"


@dataclasses.dataclass(frozen=True, slots=True)
class StageChain:
    """The stages of a skill, run in order as a chain of segments is."""

    runs: "tuple[Callable[[Arrays], Arrays], ...]"
    names: tuple[str, ...]

    def run(
        self,
        values: "Arrays",
        start: int = 0,
        stop: int | None = None,
        before_each: Callable[[], None] | None = None,
        halt: Halt | None = None,
    ) -> "dict[str, NDArray[Any]]":
        """Run stages start..stop-1 and return the message behind them; what a stage raises is not caught.

        `before_each` is called before every stage; what it raises ends the run. A stage that runs is not ended by `halt`.

        Raises:
            FormatError: a stage returned something else than arrays by name.
            Halted: `halt` was set between two stages.
        """
        import numpy as np

        message = dict(values)
        stop = len(self.runs) if stop is None else stop
        for name, work in zip(self.names[start:stop], self.runs[start:stop], strict=True):
            if before_each is not None:
                before_each()
            if halt is not None:
                halt.check()
            found = work(message)
            if not isinstance(found, Mapping):
                raise FormatError(f"stage '{name}' returned {type(found).__name__}, expected arrays by name")
            message = {key: np.asarray(array) for key, array in found.items()}
        return message


class _Source(importlib.abc.InspectLoader):
    """Runs the very bytes that were checked, whatever lies in their file by now."""

    def __init__(self, source: bytes, path: Path) -> None:
        self._source, self._path = source, path

    def get_source(self, fullname: str) -> str:
        return importlib.util.decode_source(self._source)

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self._source, str(self._path))


def load_stage(folder: Path, code: str, name: str, sha256: str | None = None) -> "StageFunction":
    """Import a stage's file, without writing beside it, and return the function that is named like the stage.

    Raises:
        TrustError: the file has not the hash `sha256`; then nothing of it was run.
        FormatError: it cannot be read, is no Python, or has no such function.
    """
    path = folder / code
    try:
        source = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{code} cannot be read: {error.strerror or error}") from None
    if sha256 is not None and (found := sha256_hex(source)) != sha256:
        raise TrustError(f"the stage's code {code} has sha256 {found[:12]}…, the plan says {sha256[:12]}…")
    loader = _Source(source, path)
    spec = importlib.machinery.ModuleSpec(f"skerry_stage_{name}", loader, origin=str(path))
    spec.has_location = True  # so that the code finds itself as __file__
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling in a skill's code look themselves up
    try:
        loader.exec_module(module)
    except SyntaxError as error:
        raise FormatError(f"{code} line {error.lineno}: {error.msg}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise FormatError(f"{code} has no function '{name}'")
    result: StageFunction = function
    return result


def fitted(kinds: Sequence[Live], arrays: "Arrays", what: str) -> "dict[str, NDArray[Any]]":
    """Return a message that was held against its types: every part of it, nothing else, in its dtype and shape.

    Raises:
        FormatError: it does not fit; the sentence begins with `what`.
    """
    import numpy as np

    if unknown := sorted(set(arrays) - {live.name for live in kinds}):
        raise FormatError(f"{what} has {unknown[0][:64]!r}, which its type has not")
    found = {}
    for live in kinds:
        if live.name not in arrays:
            raise FormatError(f"{what} lacks {live.name!r}")
        array = np.asarray(arrays[live.name])
        if str(array.dtype) != DTYPES.get(live.dtype) or not _fits(array.shape, live.shape):
            raise FormatError(
                f"{what} has {live.name!r} as {array.dtype} {list(array.shape)}, the plan says {live.dtype} {list(live.shape)}"
            )
        found[live.name] = array
    return found


def pack(kinds: Sequence[Live], message: "Arrays") -> tuple[list[list[int]], bytes]:
    """Return a message that fits its types as the shapes of its parts and their bytes, in the order of the types."""
    import numpy as np

    parts = [message[live.name] for live in kinds]
    return [list(part.shape) for part in parts], b"".join(np.ascontiguousarray(part).tobytes() for part in parts)


def unpack(kinds: Sequence[Live], shapes: object, body: memoryview) -> "dict[str, NDArray[Any]]":
    """Return the message that `pack` made, hostile until it fits its types to the byte.

    Raises:
        FormatError: it does not.
    """
    import numpy as np

    if not isinstance(shapes, list) or len(shapes) != len(kinds):
        raise FormatError(f"a message has not the {len(kinds)} parts of its type")
    found, at = {}, 0
    for live, shape in zip(kinds, shapes, strict=True):
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise FormatError(f"a message's part {live.name!r} has no shape")
        dtype, count = np.dtype(DTYPES[live.dtype]), math.prod(shape)
        if not _fits(tuple(shape), live.shape) or at + count * dtype.itemsize > min(len(body), MAX_MESSAGE_BYTES):
            raise FormatError(f"a message's part {live.name!r} does not fit its type")
        found[live.name] = np.frombuffer(body, dtype, count, at).reshape(shape)
        at += count * dtype.itemsize
    if at != len(body):
        raise FormatError(f"a message has {len(body)} bytes, its parts have {at}")
    return found


def check_stages(plan: Plan) -> None:
    """Hold a plan of stages against itself: messages that follow from each other, and all that a tail needs to run them.

    Raises:
        FormatError: what is wrong, in one sentence.
    """
    if not plan.stages or len(plan.stages) != len(plan.segments):
        raise FormatError(f"split.yaml has {len(plan.stages)} stages and {len(plan.segments)} segments: {AGAIN}")
    if plan.small is not None or plan.shared is not None or plan.replies or plan.policy.tail != "skerry":
        raise FormatError("a plan of stages has no small model, no shared constants, no replies and no stock tail")
    message, parts = plan.inputs, {part.file for part in plan.parts}
    for at, (stage, segment) in enumerate(zip(plan.stages, plan.segments, strict=True)):
        for cut in plan.cuts:
            if cut.after == at and cut.tensors != message:
                raise FormatError(
                    f"cut {cut.name} has other tensors than the message that the stage before it hands on"
                )
        if segment.inputs != tuple(live.name for live in message):
            raise FormatError(f"stage '{stage.name}' takes another message than the stage before it hands on")
        message = stage.message
        if segment.outputs != tuple(live.name for live in message):
            raise FormatError(f"stage '{stage.name}' hands on another message than its segment says")
        if stage.model not in parts:
            raise FormatError(f"stage '{stage.name}' has no model among the plan's parts: {AGAIN}")
        if odd := [live for live in message if live.dtype not in DTYPES]:
            raise FormatError(f"stage '{stage.name}' hands on {odd[0].name!r}, whose type {odd[0].dtype} cannot travel")
    if message != plan.outputs:
        raise FormatError("the last stage hands on something else than the plan's outputs")


def check_placement(skill: Skill, plan: Plan, hashes: Mapping[str, str]) -> None:
    """Hold a plan of stages against its skill, whose files have these SHA-256: what is planned must be what is shipped.

    Raises:
        FormatError: what is wrong, in one sentence.
    """
    check_stages(plan)
    named, planned = [stage.name for stage in skill.stages], [stage.name for stage in plan.stages]
    if named != planned:
        raise FormatError(f"split.yaml places {', '.join(planned)}, {skill.name} has {', '.join(named)}: {AGAIN}")
    known = set(skill.assets)
    for stage, placed, segment in zip(skill.stages, plan.stages, plan.segments, strict=True):
        models = {variant.file for variant in skill.models[stage.model].variants if variant.runtime == RUNTIME}
        if segment.file != stage.code:
            raise FormatError(f"split.yaml has stage '{stage.name}' in {segment.file}, it is in {stage.code}: {AGAIN}")
        if placed.model not in models:
            raise FormatError(
                f"split.yaml runs stage '{stage.name}' with {placed.model}, which is not its model: {AGAIN}"
            )
        known.add(placed.model)
    parts = {part.file for part in plan.parts}
    if odd := sorted(parts ^ known):
        raise FormatError(f"split.yaml and skill.yaml disagree on the file {odd[0]}: {AGAIN}")
    made: tuple[Segment | StagePart, ...] = (*plan.segments, *plan.parts)
    for part in made:
        found = hashes.get(part.file, "")
        if found != part.sha256:
            raise FormatError(f"{part.file} has sha256 {found[:12]}…, split.yaml says {part.sha256[:12]}…: {AGAIN}")
    _check_ends(skill, plan)


def _check_ends(skill: Skill, plan: Plan) -> None:
    for what, tensors, lives in (("input", skill.inputs, plan.inputs), ("output", skill.outputs, plan.outputs)):
        known = {live.name: live for live in lives}
        for tensor in tensors:
            if tensor.name not in known or not _same(tensor, known[tensor.name]):
                raise FormatError(f"split.yaml and skill.yaml disagree on the {what} {tensor.name!r}: {AGAIN}")


def _same(tensor: Tensor, live: Live) -> bool:
    return tensor.dtype == live.dtype and _fits(live.shape, tensor.shape)


def _fits(shape: Sequence[int], pattern: Sequence[int]) -> bool:
    return len(shape) == len(pattern) and all(want in (-1, have) for have, want in zip(shape, pattern, strict=True))
