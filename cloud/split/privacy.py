"""The audit of a private plan: the tensors of each true cut are gathered, and a decoder is tried on them."""

import dataclasses
from typing import Any

from cloud.split import leak
from cloud.split.graph import Flow
from cloud.split.shortlist import single_tensor_cuts
from cloud.split.task import Task, Timed
from skills import codec, ort
from skills.split_plan import Plan


def audited(task: Task, plan: Plan, timed: Timed) -> tuple[Plan, dict[str, Any]]:
    """Return the plan with what each cut gives away of the input, and the facts of that audit."""
    import numpy as np

    samples = [*task.samples, *task.more][: leak.MOST_INPUTS]
    true = [cut for cut in plan.cuts if cut.name not in ("local", "input") and not cut.raw]
    first = _shallowest(task.flow)
    shallow = ort.session(_with_output(task.graph, first), optimise=False, beside=task.beside) if first else None
    kept: dict[str, list[list[Any]]] = {cut.name: [[] for _ in cut.tensors] for cut in true}
    control = []
    for sample in samples:
        for cut in true:
            values = timed.chain.run(sample, 0, cut.after)
            for into, live in zip(kept[cut.name], cut.tensors, strict=True):
                into.append(leak.prepared(values[live.name]))
        if shallow is not None and first is not None:
            control.append(leak.prepared(shallow.run(sample, [first])[first]))
    tensors = {name: [np.concatenate(one) for one in parts] for name, parts in kept.items()}
    whole = np.concatenate([sample[task.flow.inputs[0]] for sample in samples])
    if task.image is not None:
        whole = codec.pixels(task.image, whole).transpose(0, 3, 1, 2).astype(np.float32) / 255
    proof = [np.concatenate(control)] if control else next(iter(tensors.values()), [whole])

    def told(done: int, of: int) -> None:
        task.progress("auditing what leaves", done, of)

    found, facts = leak.audit(whole, tensors, proof, picture=task.image is not None, progress=told)
    cuts = tuple(dataclasses.replace(cut, leak=found.get(cut.name)) for cut in plan.cuts)
    return dataclasses.replace(plan, cuts=cuts), facts | {"control_tensor": first}


def _shallowest(flow: Flow) -> str | None:
    """Return the first tensor that computes something of the input and alone carries it: what leaks most."""
    disguised = flow.disguised()
    for prefix in sorted(single_tensor_cuts(flow), key=len):
        (name,) = flow.live(prefix)
        if name not in disguised:
            return name
    return None


def _with_output(graph: Any, name: str) -> bytes:
    import onnx

    wide = onnx.ModelProto()
    wide.CopyFrom(graph)
    del wide.graph.output[:]
    wide.graph.output.append(onnx.ValueInfoProto(name=name))
    return bytes(wide.SerializeToString())
