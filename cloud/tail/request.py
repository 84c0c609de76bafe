"""What a request asks for and what its answer is made of, held against the plan that lies here: hostile until it fits."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from cloud.tail.store import Loaded, Store
from skills import codec, oip, rice
from skills.coding import Coding
from skills.errors import FormatError, NotFound
from skills.split_plan import Cut


@dataclasses.dataclass(frozen=True, slots=True)
class Frame:
    """A request whose header fits its plan: where to go on, and what `decode` will take beyond the message itself.

    `reply` names the coding of the answer that the caller can read; empty: none.
    """

    loaded: Loaded
    cut: Cut
    decoded_bytes: int
    decode: Callable[[], Any]
    reply: str = ""


def named(model: str, parameters: Mapping[str, oip.Parameter]) -> tuple[str, str]:
    """Return the plan and the cut that a request is about, as it says it."""
    plan = parameters.get("split.plan")
    return plain_name(model) if plan is None else (str(plan), str(parameters.get("split.cut")))


def plain_name(model: str) -> tuple[str, str]:
    """Return the plan and the cut that a model's name stands for in plain mode."""
    plan, _, cut = model.partition(".")
    return plan, cut or "input"  # without a cut: the whole model, for which the input itself is sent


def read(store: Store, model: str, call: oip.Call) -> Frame:
    """Return a request held against its plan; nothing of it is unpacked yet.

    Raises:
        FormatError: it does not fit the plan, or a compact one is about a plan that is not here.
        NotFound: a plain one is about a plan that is not here.
    """
    plan, cut_name = named(model, call.parameters)
    if "split.plan" not in call.parameters:
        loaded, cut = plain_model(store, model)
        values = _checked(loaded, cut, call)
        return Frame(loaded, cut, sum(array.nbytes for array in values.values()), lambda: values)
    try:
        loaded = store.get(plan)
    except NotFound as error:
        raise FormatError(
            str(error)
        ) from None  # the device's plan is not ours: its request is wrong here, not merely missing
    cut = loaded.plan.cut(cut_name)
    coding = _coding(cut, str(call.parameters.get("split.codec")))
    (frame,) = call.arrays.values() if len(call.arrays) == 1 else (None,)
    if frame is None or frame.ndim != 1 or frame.dtype != "uint8":
        raise FormatError("a compact request carries one UINT8 tensor of one dimension, the packed frame")
    data = frame.data
    # What says that it is larger than may be is refused by `decode`, for what it is.
    size = min(codec.decoded_bytes(cut.tensors, data), codec.MAX_DECODED_BYTES)
    if coding.kind == "rice":
        size = size // min(codec.itemsize(live) for live in cut.tensors) * rice.PEAK_BYTES
    reply = str(call.parameters.get("split.reply", ""))
    return Frame(loaded, cut, size, lambda: codec.decode(coding, cut.tensors, data), reply)


def plain_model(store: Store, model: str) -> tuple[Loaded, Cut]:
    """Return what a model's name stands for in plain mode.

    Raises:
        NotFound: its plan is not here.
        FormatError: the plan has no such cut, or leaves nothing for a tail to do.
    """
    plan, cut_name = plain_name(model)
    loaded = store.get(plan)
    cut = loaded.plan.cut(cut_name)
    if cut.after == len(loaded.plan.segments):
        raise FormatError(f"behind the cut {cut.name} nothing is left for a tail to compute")
    return loaded, cut


def _checked(loaded: Loaded, cut: Cut, call: oip.Call) -> Any:
    import numpy as np

    tensors = loaded.plan.inputs if cut.after == 0 else cut.tensors
    for live in tensors:
        array = call.arrays.get(live.name)
        if array is None:
            raise FormatError(f"the tensor {live.name!r} is missing")
        fits = len(array.shape) == len(live.shape) and all(
            said in (-1, size) for size, said in zip(array.shape, live.shape, strict=True)
        )
        if not fits or oip.datatype(array) != live.dtype or array.size == 0:
            found = f"{oip.datatype(array)} {list(array.shape)}"
            raise FormatError(f"the tensor {live.name!r} is {found}, the plan says {live.dtype} {list(live.shape)}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise FormatError(f"the tensor {live.name!r} holds NaN or infinity")
    return {live.name: call.arrays[live.name] for live in tensors}


def wanted(outputs: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the outputs that were asked for by `names`, all of them where none is named.

    Raises:
        FormatError: the model has no such output.
    """
    missing = [name for name in names if name not in outputs]
    if missing:
        raise FormatError(f"the model has no output {missing[0][:64]!r}, it has {', '.join(outputs)}")
    return {name: value for name, value in outputs.items() if not names or name in names}


def written(frame: Frame, outputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict[str, oip.Parameter]]:
    """Return an answer as it travels, and the parameters that say how: in the coding asked for where that serves, else raw."""
    import numpy as np

    plan = frame.loaded.plan
    coded = codec.encode_reply(plan.replies, plan.outputs, frame.reply, outputs) if frame.reply else None
    if coded is None:
        return outputs, {}
    return {"frame": np.frombuffer(coded, np.uint8)}, {"split.reply": frame.reply}


def _coding(cut: Cut, name: str) -> Coding:
    for coding in cut.codings:
        if coding.name == name:
            return coding
    raise FormatError(
        f"cut {cut.name} has no coding {name[:40]!r}, it has {', '.join(one.name for one in cut.codings) or 'none'}"
    )
