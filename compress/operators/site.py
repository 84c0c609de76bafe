"""What a builder of an operator is given: one node of the graph, seen once, before anything runs.

A builder reads attributes and constant inputs here and returns a function of the node's input tensors. That function
holds plain Python values only, never a tensor: tensors reach it as arguments, so that they can be trained and moved.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from skills.errors import FormatError

Compute = Callable[..., Any]  # the node's inputs (None where one is left out) -> its output, or a tuple of them
Numbers = Callable[[Sequence[Any]], Any]  # the node's inputs -> a list of Python numbers, or None


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """One node: its attributes as plain values, and those of its inputs that are constants.

    `steering` collects the inputs that are read as Python numbers: they stay on the CPU.
    """

    node: Any
    facts: Mapping[str, Any]
    constants: Mapping[str, Any]
    opset: int
    steering: set[int] = dataclasses.field(default_factory=set)

    def fact(self, name: str, default: Any = None) -> Any:
        """Return an attribute; text as `str`, lists as `list`."""
        value = self.facts.get(name, default)
        if isinstance(value, bytes):
            return value.decode()
        return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

    def has(self, at: int) -> bool:
        """Say whether input `at` is given."""
        return len(self.node.input) > at and bool(self.node.input[at])

    def numbers(self, at: int, fact: str = "", default: Any = None) -> Numbers:
        """Read the numbers that steer the operator, from attribute `fact` (older operator sets) or from input `at`."""
        fixed = default
        if fact and fact in self.facts:
            given = self.fact(fact)
            fixed = given if isinstance(given, list) else [given]
        elif self.has(at):
            constant = self.constants.get(self.node.input[at])
            if constant is None:
                self.steering.add(at)
                return lambda args: args[at].reshape(-1).tolist()
            fixed = constant.reshape(-1).tolist()
        return lambda _args: fixed

    def one_output(self) -> None:
        """Refuse a node of which more than the first output is wanted."""
        if any(self.node.output[1:]):
            raise self.refusal("more than its first output is used")

    def refusal(self, why: str) -> FormatError:
        """Return the error that says which node cannot be computed, and why."""
        return FormatError(f"{self.node.op_type} '{self.node.name or self.node.output[0]}': {why}")


Builder = Callable[[Site], Compute]
