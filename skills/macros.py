"""Model-local functions of an ONNX graph, written out again as the nodes that they stand for. Needs no onnx."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any


def expanded(model: Any) -> Any:
    """Return the model without functions; one without any is returned as it is.

    Of a call that has a name, the one node with a name inside its function takes it. Attributes of calls are not
    handed on: what `compress` writes has none.
    """
    if not model.functions:
        return model
    known = {(item.domain, item.name): item for item in model.functions}
    flat = type(model)()
    flat.CopyFrom(model)
    del flat.functions[:]
    del flat.graph.node[:]
    flat.graph.node.extend(_nodes(model.graph.node, known, {}, itertools.count()))
    domains = {node.domain for node in flat.graph.node} | {""}
    opsets = [item for item in model.opset_import if item.domain in domains]
    del flat.opset_import[:]
    flat.opset_import.extend(opsets)
    return flat


def _nodes(
    nodes: Any, known: Mapping[tuple[str, str], Any], names: Mapping[str, str], calls: Iterator[int], name: str = ""
) -> Iterator[Any]:
    """Yield the nodes, their tensors renamed by `names`; what is inside a call is named by the call's number."""
    for node in nodes:
        copy = type(node)()
        copy.CopyFrom(node)
        for field in (copy.input, copy.output):
            for at, tensor in enumerate(field):
                field[at] = names.get(tensor, tensor) if tensor else ""
        if node.name and name:
            copy.name = name
        function = known.get((node.domain, node.op_type))
        if function is None:
            yield copy
            continue
        number = next(calls)
        inner = dict(zip(function.input, copy.input, strict=False)) | dict(
            zip(function.output, copy.output, strict=False)
        )
        for made in (tensor for item in function.node for tensor in item.output):
            inner.setdefault(made, f"{made}/{number}")
        yield from _nodes(function.node, known, inner, calls, copy.name)


def call_names(model: Any) -> dict[str, list[str]]:
    """Return the names of the calls of each function, in the order of the graph."""
    calls: dict[str, list[str]] = {item.name: [] for item in model.functions}
    domains = {item.domain for item in model.functions}
    for node in model.graph.node:
        if node.domain in domains and node.op_type in calls:
            calls[node.op_type].append(node.name)
    return calls
