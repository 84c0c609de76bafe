"""How much each unit of a group matters: arrays in, one float64 score per unit out, higher means keep."""

from collections.abc import Mapping

import numpy as np

from compress.channels import Group
from compress.graph import Array


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
