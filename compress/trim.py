"""Say the same graph in fewer bytes: short names, no default attributes, small numbers as varints."""

from typing import Any

import onnx
from onnx import TensorProto

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
FLAT = {"strides": 1, "dilations": 1, "pads": 0}  # attributes that are lists of one default number
INFERRED = ("Conv", "ConvTranspose")  # their kernel_shape is the weights'


def letters(number: int) -> str:
    """Return the name number `number`, shortest first: a, b, …, 9, aa, …"""
    text = ""
    number += 1
    while number:
        number, digit = divmod(number - 1, len(ALPHABET))
        text = ALPHABET[digit] + text
    return text


def shorten(model: Any) -> None:
    """Give every inner tensor, in place, a short name; those used most get the shortest."""
    body = model.graph
    keep = {item.name for item in (*body.input, *body.output)}
    if any(attribute.g.node or attribute.graphs for node in body.node for attribute in node.attribute):
        return  # names inside If and Loop bodies refer to the outside
    uses: dict[str, int] = dict.fromkeys((item.name for item in body.initializer), 1)
    for node in body.node:
        for name in (*node.input, *node.output):
            uses[name] = uses.get(name, 0) + 1
    short = {name: name for name in keep} | {"": ""}
    at = 0
    for name in sorted(uses, key=lambda name: -uses[name]):
        if name not in short:
            while letters(at) in keep:
                at += 1
            short[name] = letters(at)
            at += 1
    for item in body.initializer:
        item.name = short[item.name]
    for node in body.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                names[at] = short[name]


def trim(model: Any) -> None:
    """Leave out, in place, what is the default anyway, and store numbers in the shorter of ONNX's two ways."""
    model.graph.name = "g"
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        kept = [attribute for attribute in node.attribute if not _default(node, attribute)]
        del node.attribute[:]
        node.attribute.extend(kept)
    for item in model.graph.initializer:
        _as_varints(item)


def _default(node: Any, attribute: Any) -> bool:
    if node.domain not in ("", "ai.onnx") or attribute.ref_attr_name:
        return False
    if attribute.name in FLAT:
        return len(attribute.ints) > 0 and all(value == FLAT[attribute.name] for value in attribute.ints)
    if attribute.name == "kernel_shape":
        return node.op_type in INFERRED
    schema = onnx.defs.get_schema(node.op_type)
    known = schema.attributes.get(attribute.name)
    if known is None or known.default_value.type != attribute.type:
        return False
    return bool(onnx.helper.get_attribute_value(known.default_value) == onnx.helper.get_attribute_value(attribute))


def _as_varints(item: Any) -> None:
    if item.data_type != TensorProto.INT64 or not item.HasField("raw_data"):
        return
    typed = TensorProto(name=item.name, data_type=item.data_type, dims=item.dims)
    typed.int64_data.extend(onnx.numpy_helper.to_array(item).reshape(-1).tolist())
    if typed.ByteSize() < item.ByteSize():
        item.CopyFrom(typed)
