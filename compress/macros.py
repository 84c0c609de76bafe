"""Say what repeats once: equal groups of nodes become an ONNX function, and each group one short call of it.

onnxruntime inlines functions when it loads a model, before it optimises, so calls cost bytes but no time. In a small
net the nodes weigh as much as the weights: one int8 Conv with its scales is some 400 bytes of nodes, a call some 30.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import onnx

DOMAIN = "_"
FRAME = 2  # bytes of a tag and a length around a node
SHORT = 3  # bytes of a tensor's name with its own tag and length, once it is shortened
CALL = 12  # bytes of a call beside its tensors: operator, domain, the layer's name


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Nodes in order. Only `outputs` are read outside; `name` is the layer's, for the audit."""

    nodes: tuple[Any, ...]
    outputs: tuple[str, ...]
    name: str = ""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Return what is read and not made here, in the order of first use."""
        made = {name for node in self.nodes for name in node.output}
        return tuple(dict.fromkeys(name for node in self.nodes for name in node.input if name and name not in made))


class Folder:
    """Folds pieces, level by level; a function may call those of an earlier level."""

    def __init__(self, opsets: Sequence[Any], letters: Callable[[int], str]) -> None:
        self.opsets, self.letters = opsets, letters
        self.functions: list[Any] = []

    def fold(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Return the pieces, those replaced by one call whose function weighs less than what it replaces."""
        alike: dict[bytes, list[int]] = {}
        for at, piece in enumerate(pieces):
            if not any(a.HasField("g") or a.graphs for node in piece.nodes for a in node.attribute):
                key = b"".join(node.SerializeToString() for node in self._body(piece))
                alike.setdefault(key, []).append(at)
        answer = list(pieces)
        for places in alike.values():
            first, name = pieces[places[0]], self.letters(len(self.functions))
            function = self._function(first, name)
            flat = sum(node.ByteSize() for node in self._body(first)) + FRAME * len(first.nodes)
            call = CALL + SHORT * (len(first.inputs) + len(first.outputs))
            if len(places) * flat > len(places) * call + function.ByteSize() + FRAME:
                self.functions.append(function)
                for at in places:
                    answer[at] = dataclasses.replace(pieces[at], nodes=(_call(pieces[at], name),))
        return answer

    def _body(self, piece: Piece) -> list[Any]:
        short = {"": ""}
        nodes = []
        for name in (*piece.inputs, *piece.outputs):
            short.setdefault(name, self.letters(len(short) - 1))
        for node in piece.nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            for names in (copy.input, copy.output):
                for at, name in enumerate(names):
                    names[at] = short.setdefault(name, self.letters(len(short) - 1))
            copy.name = "o" if node.name and node.domain != DOMAIN else ""  # the audit knows the layer's operator by it
            nodes.append(copy)
        return nodes

    def _function(self, piece: Piece, name: str) -> Any:
        body = self._body(piece)
        count = len(piece.inputs)
        used = {node.domain for node in body}
        opsets = [item for item in self.opsets if item.domain in used]
        if DOMAIN in used:
            opsets.append(onnx.helper.make_opsetid(DOMAIN, 1))
        names = [self.letters(at) for at in range(count + len(piece.outputs))]
        return onnx.helper.make_function(DOMAIN, name, names[:count], names[count:], body, opsets)


def _call(piece: Piece, function: str) -> Any:
    return onnx.helper.make_node(function, piece.inputs, piece.outputs, piece.name or None, domain=DOMAIN)
