"""Which channels of a graph live and die together: every channel gets a number, every operator says which are one.

A tensor's label is its channel axis and one number per entry of it; numbers are unified (union-find) where an operator
ties them. A convolution makes new numbers, an addition of two activations unifies theirs pair by pair, padding of
channels adds some, flattening repeats them. `FROZEN` is the number of what must stay: whatever reaches a graph output
or an operator without a rule. An unknown operator therefore costs opportunities, never correctness.

Each rule also records what has to change in the file when channels go: constants cut along an axis (`Use`), and sizes
that are written down in attributes and shape constants (`Fix`).
"""

from typing import Any

from compress.dependencies.channelwise import CHANNELWISE
from compress.dependencies.labels import Dependencies, Rule
from compress.dependencies.layers import LAYERS
from compress.dependencies.layout import LAYOUT

RULES: dict[str, Rule] = {**CHANNELWISE, **LAYERS, **LAYOUT}


def dependencies(model: Any) -> Dependencies:
    """Return the labels of every activation of a model, and what removing channels changes in its file."""
    return Dependencies(model, RULES)
