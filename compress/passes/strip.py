"""Remove what no runtime reads: metadata, doc strings, dead nodes and initializers. The size baseline is taken here."""

from typing import Any

import numpy as np
import onnx

from compress import graph


def strip(model: Any) -> Any:
    """Return the model with nothing left in it that does not compute.

    Initializers that are also declared as inputs (an old exporter's habit) become plain constants: the runtime can
    then fold them. Functions are inlined and Constant nodes become initializers, so that every pass sees one kind of
    graph.
    """
    model = graph.copy(model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    del model.metadata_props[:]
    del model.training_info[:]
    model.doc_string = model.producer_name = model.producer_version = model.domain = ""
    _constants_to_initializers(model)
    stored = {item.name for item in model.graph.initializer}
    graph.replace(model.graph.input, [item for item in model.graph.input if item.name not in stored])
    _strip_graph(model.graph)
    graph.drop_dead(model)
    used = {node.domain for node in model.graph.node} | {""}
    graph.replace(model.opset_import, [item for item in model.opset_import if item.domain in used])
    return model


def _strip_graph(body: Any) -> None:
    body.doc_string = ""
    del body.metadata_props[:]
    del body.value_info[:]
    del body.quantization_annotation[:]
    for value in (*body.input, *body.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for item in body.initializer:
        item.doc_string = ""
        del item.metadata_props[:]
    for node in body.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            attribute.doc_string = ""
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    _strip_graph(inner)


def _constants_to_initializers(model: Any) -> None:
    kept = []
    for node in model.graph.node:
        value = _constant(node)
        if value is None:
            kept.append(node)
        else:
            value.name = node.output[0]
            model.graph.initializer.append(value)
    graph.replace(model.graph.node, kept)


def _constant(node: Any) -> Any:
    if node.op_type != "Constant" or len(node.attribute) != 1:
        return None
    (attribute,) = node.attribute
    value = onnx.TensorProto()
    match attribute.name:
        case "value":
            value.CopyFrom(attribute.t)
        case "value_float" | "value_floats":
            value = graph.tensor("", np.asarray(onnx.helper.get_attribute_value(attribute), np.float32))
        case "value_int" | "value_ints":
            value = graph.tensor("", np.asarray(onnx.helper.get_attribute_value(attribute), np.int64))
        case _:
            return None
    return value
