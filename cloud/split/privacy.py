"""The audit of a private plan: the tensors of each true cut are gathered, and a decoder is tried on them."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cloud.split import leak
from cloud.split.graph import Flow
from cloud.split.images import recognise
from cloud.split.shortlist import single_tensor_cuts
from cloud.split.task import Task, Timed
from skills import codec, ort
from skills.coding import Image
from skills.split_plan import Cut, Leak

RANK = {"private": 0, "inconclusive": 1, "recoverable": 2}


class _Crossing(Mapping[str, list[Any]]):
    """What crosses each cut, of all samples; gathered whenever it is asked for, as one cut's may be hundreds of MiB.

    Nothing where a tensor has other sizes in some samples: no decoder takes those.
    """

    def __init__(self, timed: Timed, cuts: Sequence[Cut], samples: Sequence[Mapping[str, Any]]) -> None:
        self._chain, self._cuts, self._samples = timed.chain, {cut.name: cut for cut in cuts}, samples

    def __iter__(self) -> Iterator[str]:
        return iter(self._cuts)

    def __len__(self) -> int:
        return len(self._cuts)

    def __getitem__(self, name: str) -> list[Any]:
        import numpy as np

        cut = self._cuts[name]
        parts: list[list[Any]] = [[] for _ in cut.tensors]
        for sample in self._samples:
            values = self._chain.run(sample, 0, cut.after)
            for into, live in zip(parts, cut.tensors, strict=True):
                into.append(_row(values[live.name]))
        return [np.concatenate(one) for one in parts] if all(map(_even, parts)) else []


def audited(task: Task, cuts: Sequence[Cut], timed: Timed) -> tuple[tuple[Cut, ...], dict[str, Any]]:
    """Return the cuts with what each gives away of the input it gives away most of, and the facts of that audit."""
    import numpy as np

    samples = [*task.samples, *task.more][: leak.MOST_INPUTS]
    true = [cut for cut in cuts if cut.name not in ("local", "input") and not cut.raw]
    controls = {name: _shallowest(task.flow, name) for name in task.flow.inputs}
    shallow = {
        tensor: ort.session(_with_output(task.graph, tensor), optimise=False, beside=task.beside)
        for tensor in set(controls.values()) - {None}
        if tensor is not None
    }
    shown: dict[str, list[Any]] = {tensor: [] for tensor in shallow}
    for sample in samples:
        for tensor, session in shallow.items():
            shown[tensor].append(_row(session.run(sample, [tensor])[tensor]))
    tensors = _Crossing(timed, true, samples)
    steps = len(task.flow.inputs)
    found: dict[str, Leak] = {}
    facts: dict[str, Any] = {}
    each: dict[str, Any] = {}
    for at, (name, control) in enumerate(controls.items()):

        def told(done: int, of: int, at: int = at) -> None:
            task.progress("auditing what leaves", at * of + done, steps * of)

        given = [sample[name] for sample in samples]
        even = control is not None and _even(shown[control])
        proof = [np.concatenate(shown[str(control)])] if even else next(iter(tensors.values()), [])
        leaks, said = _about(task.image if steps == 1 else None, given, tensors, proof, told)
        said |= {"control_tensor": control}
        each[name] = said | {"leaks": {cut: dataclasses.asdict(one) for cut, one in leaks.items()}}
        if not facts or any(_worse(leaks[cut], found[cut]) for cut in leaks):
            facts = said
        found = {cut: one if cut not in found or _worse(one, found[cut]) else found[cut] for cut, one in leaks.items()}
    facts |= {"each_input": each} if steps > 1 else {}
    return tuple(dataclasses.replace(cut, leak=found.get(cut.name)) for cut in cuts), facts


def _about(
    image: Image | None,
    values: Sequence[Any],
    tensors: Mapping[str, Sequence[Any]],
    proof: Sequence[Any],
    told: Callable[[int, int], None],
) -> tuple[dict[str, Leak], dict[str, Any]]:
    """Audit what the cuts give away of one input; `values` has it of every sample."""
    import numpy as np

    same = len({array.shape[1:] for array in values}) == 1
    whole = np.concatenate(values) if same else np.zeros((0, 1))
    if not same or (len(whole) > 1 and (whole == whole[:1]).all()) or len(whole) != len(values):
        none = Leak("inconclusive", "explained variance", 0.0, len(values), flat=False)
        why = "an input that is the same in all samples, or has another shape in each, cannot be judged"
        told(1, 1)
        return dict.fromkeys(tensors, none), _no_audit(len(values), why)
    image = image or recognise(whole)
    if image is not None and whole.ndim == 4:
        whole = codec.pixels(image, whole).transpose(0, 3, 1, 2).astype(np.float32) / 255
        return leak.audit(whole, tensors, proof or [whole], picture=True, progress=told)
    return leak.audit(whole, tensors, proof or [whole], picture=False, progress=told)


def _row(array: Any) -> Any:
    """Return what one sample gives as the audit keeps it, one row: its first size may be another thing than the sample."""
    small = leak.prepared(array)
    return small if array.shape[:1] == (1,) else small[None]


def _even(parts: Sequence[Any]) -> bool:
    return len({one.shape for one in parts}) == 1 and parts[0].size > 0


def _no_audit(count: int, why: str) -> dict[str, Any]:
    return {
        "inputs": count, "least_inputs": leak.LEAST_INPUTS, "threshold": leak.MAX_LEAK, "floor": 0.0,
        "measure": "explained variance", "why": why,
    }  # fmt: skip


def _worse(one: Leak, other: Leak) -> bool:
    return (RANK[one.verdict], one.value) > (RANK[other.verdict], other.value)


def _shallowest(flow: Flow, name: str) -> str | None:
    """Return the first tensor that computes something of an input: what leaks most. A single one it carries alone."""
    disguised = flow.disguised()
    if len(flow.inputs) == 1:
        for prefix in sorted(single_tensor_cuts(flow), key=len):
            (tensor,) = flow.live(prefix)
            if tensor not in disguised:
                return tensor
        return None
    found = [
        (len(flow.ancestors(tensor)), tensor)
        for op in flow.ops
        for tensor in op.outputs
        if tensor in flow.elements and tensor not in disguised and tensor not in flow.glued()
        if any(name in flow.ops[at].inputs for at in flow.ancestors(tensor))
    ]
    return min(found)[1] if found else None


def _with_output(graph: Any, name: str) -> bytes:
    import onnx

    wide = onnx.ModelProto()
    wide.CopyFrom(graph)
    del wide.graph.output[:]
    wide.graph.output.append(onnx.ValueInfoProto(name=name))
    return bytes(wide.SerializeToString())
