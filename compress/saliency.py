"""How much each unit of a group matters: scores from weights, gradients or activations, higher means keep.

All are pure: arrays in, one float64 score per unit out. Scores of one group are comparable; only `taylor` and
`contribution` are meant to be compared between groups as well.
"""

from collections.abc import Mapping

import numpy as np

from compress.channels import Group, Member
from compress.graph import Array


def magnitude(weights: Mapping[str, Array], group: Group, order: int = 2) -> Array:
    """Return the norm of order 1 or 2 of the weights and biases that make each unit (Li et al., arXiv 1608.08710)."""
    total = np.zeros(group.size)
    for member in _makers(group):
        total += (np.abs(_of_units(weights, member)) ** order).sum(axis=1)
    return np.asarray(total ** (1 / order), np.float64)


def taylor(weights: Mapping[str, Array], gradients: Mapping[str, Array], group: Group) -> Array:
    """Return the squared first-order change of the loss when a unit goes (Molchanov et al., arXiv 1906.10771).

    `gradients` are those of the loss, by initializer; one that is absent counts as zero.
    """
    total = np.zeros(group.size)
    for member in _makers(group):
        if member.weight in gradients:
            total += (_of_units(weights, member) * _of_units(gradients, member)).sum(axis=1)
    return np.asarray(total**2, np.float64)


def contribution(weights: Mapping[str, Array], group: Group, power: Mapping[str, Array]) -> Array:
    """Return the share that each unit has in the energy of its readers' sums, added up over the readers.

    `power` is the mean square of each channel of the tensors that the readers take in. The share of channel c of a
    reader with weights W is power[c]·|W[c]|² over the sum of it over all channels: what Wanda (arXiv 2306.11695) scores
    for single weights. A unit that nobody reads scores zero.
    """
    total = np.zeros(group.size)
    for member in group.members:
        if member.role == "reads":
            weight = np.moveaxis(weights[member.weight], member.axis, 0).astype(np.float64)
            energy = power[member.tensor] * (weight.reshape(len(weight), -1) ** 2).sum(axis=1)
            total += energy[member.index].sum(axis=1) / max(float(energy.sum()), 1e-30)
    return total


def _makers(group: Group) -> list[Member]:
    return [member for member in group.members if member.role == "makes"]


def _of_units(values: Mapping[str, Array], member: Member) -> Array:
    """Return a member's numbers as one row per unit."""
    first = np.moveaxis(values[member.weight], member.axis, 0).astype(np.float64)
    return first[member.index].reshape(len(member.index), -1)
