"""Two networks run side by side over some inputs, node by node, so that one can be made to answer as the other does."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from compress import graph
from compress.graph import Array
from compress.measure import batches
from compress.to_torch import Twin
from skills.ort import Port

MOST_HELD = 1 << 26  # numbers of the largest activation that are kept at once: more samples than that are left out

Tensor = Any
Change = Callable[[str, Tensor], Tensor]  # of a tensor, by its name
Flow = dict[str, Tensor]


class Beside:
    """A network and a changed one, and the tensors of both that are still needed, batch by batch.

    The changed one's nodes make tensors of the same names. `shown` is what the changed one's nodes read of a tensor that it made,
    `wanted` what of the first one's it should be.

    Raises:
        FormatError: an operator of a graph has no torch counterpart.
    """

    def __init__(
        self, first: Any, changed: Any, x: Array, shown: Change = lambda _name, value: value,
        wanted: Change = lambda _name, value: value,
    ) -> None:  # fmt: skip
        self.first, self.changed = Twin(first), Twin(changed)
        self._order, self._shown, self._wanted = list(first.graph.node), shown, wanted
        self._nodes = {_made(node): node for node in changed.graph.node}
        self._readers = graph.consumers(changed)
        self._last = [_last_read(first), _last_read(changed)]
        name = first.graph.input[0].name
        self._flows: list[tuple[Flow, Flow]] = [
            ({name: value}, {name: shown(name, value)})
            for value in (torch.from_numpy(np.array(part)) for part in held_batches(first, x))
        ]

    def nodes(self) -> Iterator[Any]:
        """Yield each node of the changed network before it runs: its weights may be changed then."""
        for node in self._order:
            for first, _ in self._flows:
                first.update(_outputs(self.first, node, first, self._last[0]))
            mine = self._nodes.get(_made(node))
            if mine is not None:
                yield mine
                for _, second in self._flows:
                    made = _outputs(self.changed, mine, second, self._last[1])
                    second.update({name: self._shown(name, value) for name, value in made.items()})
            for flows in self._flows:
                for flow, last, one in zip(flows, self._last, (node, mine), strict=True):
                    for name in one.input if one is not None else ():
                        if last.get(name) == _made(one):
                            flow.pop(name, None)

    def pairs(self, node: Any) -> list[tuple[Tensor, Tensor]]:
        """Return for each batch what the node that was yielded last reads, and what it should answer.

        Where only an addition reads its answer, that is also what the other term is off by.
        """
        return [(second[node.input[0]], self._target(node.output[0], first, second)) for first, second in self._flows]

    def _target(self, name: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Tensor:
        after = self._readers.get(name, [])
        target = self._wanted(name, first[name])
        for other in after[0].input if len(after) == 1 and after[0].op_type == "Add" else ():
            if other != name and other in first and other in second:
                there = self._wanted(other, first[other])
                if there.shape == second[other].shape == target.shape:
                    return target + (there - second[other])
        return target


def _made(node: Any) -> str:
    """Return the first output that a node has: some leave out what would come first."""
    return next((name for name in node.output if name), "")


def _last_read(model: Any) -> dict[str, str]:
    """Return for every tensor which node, by its first output, reads it last; of the graph's outputs none does."""
    last = {name: _made(node) for node in model.graph.node for name in node.input}
    return last | dict.fromkeys(graph.outputs(model), "")


def _outputs(twin: Twin, node: Any, flow: Mapping[str, Tensor], needed: Mapping[str, str]) -> dict[str, Tensor]:
    feeds = {name: flow[name] for name in node.input if name in flow}
    wanted = [name for name in node.output if name in needed]
    return twin.run(feeds, wanted) if feeds and wanted else {}


def held_batches(model: Any, x: Array) -> list[Array]:
    """Cut the samples as the model takes them, and no more of them than memory holds."""
    item = model.graph.input[0]
    shape = tuple(d.dim_value or -1 for d in item.type.tensor_type.shape.dim)
    largest = max((abs(int(np.prod(size[1:]))) for size in graph.shapes(model).values() if len(size) > 1), default=1)
    if shape[0] < 1:
        x = x[: max(1, MOST_HELD // largest)]
    return batches(Port(item.name, x.dtype.name, shape), x)
