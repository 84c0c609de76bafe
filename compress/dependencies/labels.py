"""What is known of a graph's channels: a number for each, which of them are one, and what follows when some go."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from compress import graph
from compress.graph import Array

FROZEN = 0
Role = Literal["makes", "reads", "shapes"]
Alive = Callable[[Array], Array]  # channel numbers → which of them stay


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Label:
    """The channel axis of a tensor and the number of each channel on it."""

    axis: int
    ids: Array


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Use:
    """Input `at` of node number `node` is a constant whose `axis` runs over the channels `ids` of `tensor`."""

    node: int
    at: int
    axis: int
    ids: Array
    role: Role
    tensor: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Fix:
    """Input `at` (a constant) or attribute `attribute` of node number `node` has to become `value(alive)`."""

    node: int
    at: int
    attribute: str
    value: Callable[[Alive], Any]


class Dependencies:
    """The labels of every activation of a model, and what removing channels changes in its file, by `rules`."""

    def __init__(self, model: Any, rules: Mapping[str, "Rule"]) -> None:
        self.values = graph.arrays(model)
        self.sizes = graph.shapes(model)
        self.readers = graph.consumers(model)
        self.labels: dict[str, Label] = {}
        self.uses: list[Use] = []
        self.fixes: list[Fix] = []
        self._parent = [FROZEN]
        self._at = 0
        for self._at, node in enumerate(model.graph.node):
            if any(item.HasField("g") or item.graphs for item in node.attribute):
                self._freeze_outer(node)
            else:
                rules.get(node.op_type, barrier)(self, node)
        for name in graph.outputs(model):
            self.freeze(name)

    def root(self, number: int) -> int:
        """Return the smallest number unified with this one; `FROZEN` is the smallest of all."""
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def roots(self, ids: Array) -> Array:
        """Return the root of each number."""
        return np.fromiter((self.root(int(i)) for i in ids), np.int64, len(ids))

    def fresh(self, count: int) -> Array:
        """Return new numbers."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def tie(self, one: Array, other: Array) -> None:
        """Unify numbers pair by pair."""
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            low, high = sorted((self.root(a), self.root(b)))
            self._parent[high] = low

    def freeze(self, *names: str) -> None:
        """Keep every channel of these tensors."""
        for name in names:
            if name in self.labels:
                ids = self.labels[name].ids
                self.tie(ids, np.full(len(ids), FROZEN))

    def rank(self, name: str) -> int | None:
        """Return how many axes a tensor has, None where that is not known."""
        return len(self.sizes[name]) if name in self.sizes else None

    def use(self, at: int, axis: int, ids: Array, role: Role, tensor: str) -> None:
        """Record that constant input `at` of the present node runs over these channels."""
        if ids.any():
            self.uses.append(Use(self._at, at, axis, ids, role, tensor))

    def fix_input(self, at: int, value: Callable[[Alive], Any]) -> None:
        """Record how constant input `at` of the present node follows."""
        self.fixes.append(Fix(self._at, at, "", value))

    def fix_attribute(self, name: str, value: Callable[[Alive], Any]) -> None:
        """Record how an attribute of the present node follows."""
        self.fixes.append(Fix(self._at, -1, name, value))

    def constant(self, node: Any, at: int) -> Array | None:
        """Return the value of a constant input, None where there is none or it is computed."""
        return self.values.get(node.input[at]) if len(node.input) > at else None

    def _freeze_outer(self, node: Any) -> None:
        self.freeze(*node.input)
        for item in node.attribute:
            self.freeze(*graph.outer_names(item))


def barrier(deps: Dependencies, node: Any) -> None:
    """Keep all that comes in; nothing is known about what goes out."""
    deps.freeze(*node.input)


Rule = Callable[[Dependencies, Any], None]  # writes down what one node ties, reads and makes
