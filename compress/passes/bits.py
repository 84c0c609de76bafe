"""Choose for each layer whether 4 bits are enough, under the accuracy budget.

Each layer alone is put to 4 bits and the distance to the original's answers measured (no labels needed, and far less
noisy than accuracy). Layers are then ordered by distance per byte saved; how many of them the budget allows is found
by bisection with the real model: on the real metric of the select part, and on the drop that the original's own
confidence foretells. The search looks at nothing else, so the report part stays unseen.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from compress.emit import MIN_PACKED, emit, widths
from compress.measure import answers, points, soft_drop
from compress.packing import DIGITS_RUNTIME
from compress.passes.bias import distance
from compress.pipeline import Bench, Pass, State
from compress.scheme import Layer, Scheme
from skills import ort

BUDGET_SHARE = 0.6  # of the budget may be spent on the select part: what is chosen on it looks better there than it is


def order(layers: Sequence[Layer], harm: dict[str, float]) -> list[str]:
    """Return the layers' names, the one with the least harm per byte saved first; ties go to the earlier layer. Pure."""
    return [
        layer.node
        for layer in sorted(layers, key=lambda layer: (max(harm[layer.node], 0.0) / layer.count, layers.index(layer)))
    ]


def most_that_pass(count: int, passes: Callable[[int], bool]) -> int:
    """Return the largest k of 0..count for which `passes(k)` holds, if it holds up to some k and then no more. Pure.

    `count` itself is tried first, 0 never: it is what remains when nothing else passes.
    """
    if count == 0 or passes(count):
        return count
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    return low


def expected_drop(state: State, scheme: Scheme, bench: Bench) -> float:
    """Return the drop in points to expect: the larger of the one measured on select and the one foretold without labels."""
    select, calibrate = bench.splits.select, bench.splits.calibrate
    session = ort.session(emit(state.model, scheme, state.seen()).SerializeToString(), bench.threads)
    got = answers(session, select.x)
    measured = points(bench.metric, select, bench.original_select, got)
    if bench.metric.name != "top1":
        return measured
    original = np.concatenate([bench.original_select, bench.original_calibrate])
    return max(measured, soft_drop(original, np.concatenate([got, answers(session, calibrate.x)])))


def _run(state: State, bench: Bench) -> State:
    scheme = state.planned()
    able = [layer for layer in scheme.layers if layer.count >= MIN_PACKED]
    if 4 not in widths(state.model, bench.profile) or bench.goal == "latency" or not able:
        return state
    plain = distance(state, scheme, bench)
    harm: dict[str, float] = {}
    for at, layer in enumerate(able):
        harm[layer.node] = distance(state, scheme.with_bits({layer.node: 4}), bench) - plain
        bench.say(0.7 * (at + 1) / len(able), "")
    ranked = order(able, harm)
    looks = 0

    def fits(k: int) -> bool:
        nonlocal looks
        looks += 1
        drop = expected_drop(state, scheme.with_bits(dict.fromkeys(ranked[:k], 4)), bench)
        good = drop <= BUDGET_SHARE * bench.max_drop
        bench.say(min(0.99, 0.7 + 0.05 * looks), f"{k} of {len(able)} layers in 4 bits: {drop:+.2f} points")
        return good

    k = most_that_pass(len(ranked), fits)
    note = f"{k} of {len(able)} layers are stored in 4 bits, the others in 8; {looks} whole models were tried."
    if k:
        note += f" Weights of less than 8 bits need onnxruntime {'.'.join(map(str, DIGITS_RUNTIME))} or newer."
    chosen = scheme.with_bits(dict.fromkeys(ranked[:k], 4))
    return dataclasses.replace(state, scheme=chosen, notes=(*state.notes, note), harm=harm)


BITS = Pass("bits", "choosing bits for each layer", _run)
