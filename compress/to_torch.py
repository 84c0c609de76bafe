"""An ONNX graph as a torch module that can be trained and written back: the twin.

Each node becomes one prepared function when the twin is made (compress/operators); a call only passes tensors along.
Nothing is traced or exported: trained weights go back into the initializers that they came from.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from compress import graph
from compress.operators import OPERATORS
from compress.operators.site import Compute, Site
from skills.errors import FormatError, NotFound

WEIGHT_INPUTS = {
    "Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1), "BatchNormalization": (1, 2),
    "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2), "LayerNormalization": (1, 2), "PRelu": (1,),
    "LSTM": (1, 2, 3), "GRU": (1, 2, 3), "RNN": (1, 2, 3), "Gather": (0,), "Einsum": (0, 1),
}  # fmt: skip
VECTOR_INPUTS = ("Add", "Sub", "Mul", "Div")  # here a vector is a weight; scalars and tables (0.5, anchors) are formula
LAYOUT_ONLY = ("Identity", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")

Tensor = Any


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """One node, ready to run; `moved` are inputs made on the CPU that a computation elsewhere needs beside it."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    compute: Compute
    moved: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    """What one kind of call runs: steps, what each leaves behind, and the stored tensors that they read."""

    steps: tuple[tuple[_Step, tuple[str, ...]], ...]
    weights: tuple[str, ...]
    constants: tuple[str, ...]


class Twin(torch.nn.Module):  # type: ignore[misc]
    """The graph of `model` as a module. Train `weights`, then ask for the graph with them: `to_onnx`.

    `on_weight` maps initializers to a transform through which each run sees them (fake quantization); `on_tensor`
    does the same for activations, once, when they are made or fed. Both are plain dicts, to be changed at any time.
    Batch-norm always uses its stored mean and variance, dropout does nothing: `train()` changes no answer.

    Raises:
        FormatError: the graph has operators that cannot be computed; each is named with its node.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.on_weight: dict[str, Callable[[Tensor], Tensor]] = {}
        self.on_tensor: dict[str, Callable[[Tensor], Tensor]] = {}
        self._model = graph.copy(model)
        body = self._model.graph
        stored = graph.arrays(self._model)
        self.inputs = tuple(item.name for item in body.input if item.name not in stored)
        self.outputs = tuple(item.name for item in body.output)
        self._trained = frozenset(_weights(self._model, stored))
        self._keys: dict[str, str] = {}  # initializer -> parameter or buffer; torch forbids dots in names
        self._host: dict[str, Tensor] = {}  # integers: read as sizes and indices, they stay on the CPU
        for name, value in stored.items():
            if name in self._trained:
                self._keep_weight(name, value)
            else:
                self._keep_constant(name, torch.from_numpy(np.array(value)))
        self._plans: dict[tuple[frozenset[str], tuple[str, ...]], _Plan] = {}
        self._makers = self._build()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The trainable parameters by the name of their initializer."""
        return {name: self._parameters[key] for name, key in self._keys.items() if name in self._trained}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the graph's first output for its inputs, given in their order."""
        return self.run(dict(zip(self.inputs, inputs, strict=True)), self.outputs[:1])[self.outputs[0]]

    def run(self, feeds: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
        """Return the `wanted` tensors, computing only what lies between the fed tensors and them.

        Raises:
            NotFound: a wanted tensor does not follow from those fed, or a transform is set for a name that is not there.
        """
        self._check_transforms()
        key = (frozenset(feeds), tuple(wanted))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._planned(feeds, wanted)
        values = self._stored(plan)
        values.update(feeds)
        self._transform(values, feeds)
        away = next((value.device for value in feeds.values() if value.device.type != "cpu"), None)
        for step, done in plan.steps:
            args = [values[name] for name in step.inputs]
            if away is not None:
                for at in step.moved:
                    args[at] = args[at].to(away)
            made = step.compute(*args)
            if isinstance(made, tuple):
                values.update(zip(step.outputs, made, strict=False))
                values[""] = None  # an output left out is no input left out
            else:
                values[step.outputs[0]] = made
            if self.on_tensor:
                self._transform(values, step.outputs)
            for name in done:
                del values[name]
        return {name: values[name] for name in wanted}

    def to_onnx(self) -> Any:
        """Return the graph with the weights as they are now; one that did not change keeps its very bytes."""
        model = graph.copy(self._model)
        now = self.weights
        for item in model.graph.initializer:
            if item.name in now:
                value = now[item.name].detach().cpu().contiguous().numpy()
                if value.tobytes() != graph.array(item).tobytes():
                    item.CopyFrom(graph.tensor(item.name, value))
        return model

    def _keep_weight(self, name: str, value: graph.Array) -> None:
        tensor = torch.from_numpy(np.array(value))
        if tensor.ndim == 4:  # convolutions then keep activations channels-last too, which is faster
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        self._keys[name] = f"{len(self._keys)}:{name.replace('.', '_')}"
        self.register_parameter(self._keys[name], torch.nn.Parameter(tensor))

    def _keep_constant(self, name: str, value: Tensor) -> None:
        if value.is_floating_point():
            self._keys[name] = f"{len(self._keys)}:{name.replace('.', '_')}"
            self.register_buffer(self._keys[name], value, persistent=False)
        else:
            self._host[name] = value

    def _stored(self, plan: _Plan) -> dict[str, Any]:
        """Return the stored tensors that a plan reads, weights as their transforms show them; "" is an input left out."""
        values: dict[str, Any] = {"": None}
        for name in plan.constants:
            values[name] = self._constant(name)
        for name in plan.weights:
            weight = self._parameters[self._keys[name]]
            values[name] = self.on_weight[name](weight) if name in self.on_weight else weight
        return values

    def _transform(self, values: dict[str, Any], names: Iterable[str]) -> None:
        for name in names:
            if name in self.on_tensor:
                values[name] = self.on_tensor[name](values[name])

    def _constant(self, name: str) -> Tensor:
        return self._host[name] if name in self._host else self._buffers[self._keys[name]]

    def _build(self) -> dict[str, _Step]:
        """Prepare every node, computing at once what follows from constants alone; return the maker of each tensor."""
        makers: dict[str, _Step] = {}
        opset = graph.opset(self._model)
        faults: dict[str, list[str]] = {}
        refused: list[str] = []
        constants = {name: self._constant(name) for name in (*self._host, *self._keys) if name not in self._trained}
        on_cpu = set(self._host)
        for node in self._model.graph.node:
            builder = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if builder is None:
                faults.setdefault(node.op_type, []).append(node.name or node.output[0])
                continue
            site = Site(node, graph.attributes(node), constants, opset)
            try:
                compute = builder(site)
            except FormatError as error:
                refused.append(str(error))
                continue
            reads = [name for name in node.input if name]
            if all(name in constants for name in reads) and not faults and not refused:
                made = compute(*(constants[name] if name else None for name in node.input))
                for name, value in zip(node.output, made if isinstance(made, tuple) else (made,), strict=False):
                    constants[name] = value
                    self._keep_constant(name, value)
                    if name in self._host:
                        on_cpu.add(name)
                continue
            host = node.op_type in ("Shape", "Size") or all(name in on_cpu for name in reads)
            if host:
                on_cpu.update(node.output)
            moved = () if host else tuple(
                at for at, name in enumerate(node.input) if name in on_cpu and at not in site.steering
            )  # fmt: skip
            step = _Step(tuple(node.input), tuple(node.output), compute, moved)
            makers.update((name, step) for name in node.output if name)
        _complain(faults, refused)
        return makers

    def _planned(self, feeds: Iterable[str], wanted: Sequence[str]) -> _Plan:
        """Walk back from the wanted tensors to the fed and the stored ones; note where each was read last."""
        given = set(feeds)
        order: dict[int, _Step] = {}
        stored: dict[str, None] = {}
        waiting = [(name, False) for name in reversed(wanted)]
        while waiting:
            name, ready = waiting.pop()
            if not name or name in given or (not ready and name in stored):
                continue
            step = self._makers.get(name)
            if step is None:
                if name not in self._keys and name not in self._host:
                    raise NotFound(f"tensor '{name}' is needed and neither fed nor made by the graph: feed it")
                stored[name] = None
            elif id(step) not in order:
                if ready:
                    order[id(step)] = step
                else:
                    waiting.append((name, True))
                    waiting.extend((source, False) for source in step.inputs)
        steps = list(order.values())
        last: dict[str, int] = {}
        for at, step in enumerate(steps):
            last.update((name, at) for name in (*step.inputs, *step.outputs) if name and name not in wanted)
        done: dict[int, list[str]] = {}
        for name, at in last.items():
            done.setdefault(at, []).append(name)
        return _Plan(
            tuple((step, tuple(done.get(at, ()))) for at, step in enumerate(steps)),
            tuple(name for name in stored if name in self._trained),
            tuple(name for name in stored if name not in self._trained),
        )

    def _check_transforms(self) -> None:
        for name in self.on_weight:
            if name not in self._trained:
                raise NotFound(f"on_weight names '{name}', which is no weight of this graph: see `weights`")
        for name in self.on_tensor:
            if name not in self._makers and name not in self.inputs:
                raise NotFound(f"on_tensor names '{name}', which is no activation of this graph")


def _weights(model: Any, stored: Mapping[str, graph.Array]) -> set[str]:
    """Return the initializers that are weights: float32, read as data by an operator that computes with them."""
    found: set[str] = set()
    for node in reversed(model.graph.node):
        if node.op_type in VECTOR_INPUTS:
            found.update(n for n in node.input if n not in stored or 1 < stored[n].size == max(stored[n].shape))
        elif node.op_type in LAYOUT_ONLY and node.output[0] in found:
            found.add(node.input[0])
        else:
            slots = WEIGHT_INPUTS.get(node.op_type, ())
            found.update(name for at, name in enumerate(node.input) if at in slots)
    return {name for name in found if name in stored and stored[name].dtype == np.float32}


def _complain(missing: Mapping[str, Sequence[str]], refused: Sequence[str]) -> None:
    said = [f"{kind} (node {', '.join(repr(n) for n in nodes[:5])})" for kind, nodes in sorted(missing.items())]
    parts = [f"operators without a torch counterpart: {', '.join(said)}"] if said else []
    if parts or refused:
        raise FormatError("; ".join((*parts, *refused)) + ": export the model with other operators")
