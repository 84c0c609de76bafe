"""Choose which channels and residual branches go, so that a network loses least for what it saves.

Everything is planned in the numbering of the graph that came in, whatever was removed or trained since: removed parts
count as zeros, which is what `channels.shrink` makes of them. A candidate's harm is the distance of the answers without
it to the original's, on a few calibration inputs; the cheapest harm for what it saves goes first, and after each round
everything is measured anew, since harms do not add up.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from compress import graph
from compress.beside import held_batches
from compress.channels import Branch, Group, Shrink, branches, groups, params, rounded, work
from compress.graph import Array
from compress.measure import divergence
from compress.saliency import contribution
from compress.to_torch import Twin

ROUNDS = 3
SAMPLES = 128
CHUNK = 0.25  # of a group's channels go at once
LEAST_KEPT = 0.25  # of a group's channels stay
WIDE = 32  # from so many channels on, kept counts are multiples of 8; of 4 below

Spared = Literal["size", "latency"]  # what removing is for


def cost(model: Any, whole: Any, spared: Spared, block: int = 1) -> float:
    """Return what is left of a network's cost, 0..1: weights for size, work for latency.

    `block` is how many channels the runtime computes at once: fewer take as long.
    """
    if spared == "size":
        return sum(params(model).values()) / max(1, sum(params(whole).values()))
    return work(model, block) / max(1, work(whole, block))


def choose(
    model: Any, now: Shrink, x: Array, original: Array, target: float, spared: Spared,
    say: Callable[[float], None] = lambda _share: None, multiple: int = 0, block: int = 1, *,
    left: Callable[[], float] = lambda: math.inf, classes: bool = True,
) -> Shrink:  # fmt: skip
    """Return `now` and more to remove, until at most `target` of the cost of `model` is left or nothing more can go.

    `original` is what the network answered to `x` before anything was removed; channels are kept in multiples of
    `multiple`, or of 8 in wide layers and 4 in narrow ones where it is 0. `block` is that of `cost`. What there is to choose
    from is weighed anew in each of `ROUNDS`; where no seconds are `left` before one ends, what it began is not done. `classes`
    is as `measure.divergence` takes it.
    """
    probe = _Probe(model, x, original, multiple, block, classes=classes)
    rest = cost(now.apply(model), model, spared, block)
    for turn in range(ROUNDS):
        if rest <= target:
            break
        until = target + (rest - target) * (ROUNDS - 1 - turn) / (ROUNDS - turn)
        plain = probe.harm(now)
        found = []
        steps = list(probe.candidates(now))
        for at, step in enumerate(steps):
            if left() <= 0:
                return now
            saved = rest - cost(step.apply(model), model, spared, block)
            if saved > 0:
                found.append((max(probe.harm(step) - plain, 0.0) / saved, at, step))
            say((turn + (at + 1) / len(steps)) / ROUNDS)
        if not found:
            break
        for _, _, step in sorted(found, key=lambda row: row[:2]):
            now = _joined(now, step)
            rest = cost(now.apply(model), model, spared, block)
            if rest <= until:
                break
    say(1.0)
    return now


def lift(model: Any, done: Shrink, trained: Any) -> Any:
    """Return `model` with the weights of `trained`, a trained form of `done.apply(model)`, put back where they were."""
    places = graph.copy(model)
    for item in places.graph.initializer:
        value = graph.array(item)
        if value.dtype == np.float32:
            item.CopyFrom(graph.tensor(item.name, np.arange(value.size, dtype=np.int64).reshape(value.shape)))
    where = graph.arrays(done.apply(places))
    new = graph.arrays(trained)
    full = graph.copy(model)
    for item in full.graph.initializer:
        at = where.get(item.name)
        if at is not None and at.dtype == np.int64 and item.name in new and new[item.name].shape == at.shape:
            value = graph.array(item).copy()
            if value.dtype == np.float32:
                value.reshape(-1)[at.reshape(-1)] = new[item.name].reshape(-1)
                item.CopyFrom(graph.tensor(item.name, value))
    return full


def _joined(one: Shrink, other: Shrink) -> Shrink:
    """Return what both remove."""
    keep = dict(one.keep)
    for number, units in other.keep.items():
        keep[number] = tuple(unit for unit in keep.get(number, units) if unit in set(units))
    return Shrink(keep, tuple(dict.fromkeys((*one.without, *other.without))))


class _Probe:
    """The network with parts of it at zero, and how far its answers then are from the original's."""

    def __init__(self, model: Any, x: Array, original: Array, multiple: int, block: int, *, classes: bool) -> None:
        self.parts = [torch.from_numpy(np.array(part)) for part in held_batches(model, x)]
        self.original = original[: sum(map(len, self.parts))]
        self.model, self.multiple, self.block, self.classes = model, multiple, block, classes
        self.twin = Twin(model).eval()
        self.groups: tuple[Group, ...] = groups(model)
        self.branches: dict[str, Branch] = {branch.add: branch for branch in branches(model)}
        self.values = graph.arrays(model)
        self.inner = {
            node.name: next(name for name in node.input if name != self.branches[node.name].kept)
            for node in model.graph.node
            if node.name in self.branches
        }
        self.power: dict[str, Array] = {}

    def harm(self, state: Shrink) -> float:
        """Return the distance to the original's answers with these parts removed."""
        self._mask(state)
        with torch.no_grad():
            got = np.concatenate([self.twin(part).numpy() for part in self.parts])
        return divergence(self.original, got, classes=self.classes)

    def candidates(self, state: Shrink) -> list[Shrink]:
        """Return the next steps: each branch that is left, and the least channels of each group that is wide enough."""
        self._mask(state)
        self._look()
        gone = {name for add in state.without for name in self.branches[add].nodes}
        found = [
            dataclasses.replace(state, without=(*state.without, add))
            for add in self.branches
            if add not in state.without
        ]
        for number, group in enumerate(self.groups):
            units = state.keep.get(number, tuple(range(group.size)))
            multiple = self.multiple or (8 if group.size >= WIDE else 4)
            least = rounded(group.size * LEAST_KEPT, multiple, multiple)
            if len(units) <= least or set(group.makers) <= gone or not group.makers:
                continue
            scores = contribution(self.values, group, self.power)
            ranked = sorted(units, key=lambda unit: -scores[unit])
            step = max(rounded(len(units) - group.size * CHUNK, multiple, least), least)
            fewer = (len(units) - 1) // self.block * self.block if self.block > 1 else 0  # a block less to compute
            found += [
                dataclasses.replace(state, keep={**state.keep, number: tuple(sorted(ranked[:stay]))})
                for stay in sorted({step, fewer} if fewer >= least else {step})
            ]
        return found

    def _mask(self, state: Shrink) -> None:
        self.twin.on_weight.clear()
        self.twin.on_tensor.clear()
        masks: dict[str, Array] = {}
        for number, kept in state.keep.items():
            group = self.groups[number]
            removed = np.setdiff1d(np.arange(group.size), kept)
            for member in group.members:
                if member.role != "makes" or member.weight not in self.twin.weights:
                    continue
                mask = masks.setdefault(member.weight, np.ones(self.values[member.weight].shape, np.float32))
                np.moveaxis(mask, member.axis, 0)[member.index[removed].reshape(-1)] = 0
        for name, mask in masks.items():
            self.twin.on_weight[name] = torch.from_numpy(mask).mul
        for add in state.without:
            self.twin.on_tensor[self.inner[add]] = torch.zeros_like

    def _look(self) -> None:
        """Take the mean square of each channel that a layer reads."""
        reads = [m for group in self.groups for m in group.members if m.role == "reads"]
        sizes = {m.tensor: self.values[m.weight].shape[m.axis] for m in reads}
        fed = set(self.twin.inputs)
        wanted = [name for name in sizes if name not in fed]
        sums: dict[str, Array] = {}
        with torch.no_grad():
            for part in self.parts:
                for name, value in self.twin.run({self.twin.inputs[0]: part}, wanted).items():
                    over = [axis for axis in range(value.ndim) if axis != _channel_axis(value, sizes[name])]
                    mean = (value.double() ** 2).mean(over).numpy() * len(part)
                    sums[name] = sums[name] + mean if name in sums else mean
        self.power |= {name: total / len(self.original) for name, total in sums.items()}


def _channel_axis(value: Any, size: int) -> int:
    return 1 if value.shape[1] == size else int(value.ndim) - 1
