"""Keep int8 only where it is faster: race the ways to compute on this machine and take the quickest.

int8 depthwise convolutions are slower than float ones on some machines, a first layer reads one to three channels, for
which int8 kernels are not made, and a net of a few small layers can lose more on its seams than its kernels win. The race
is between whole models, since per-node times do not add up; any other layer alone in float would add two seams.
"""

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from compress.data import whole_runs
from compress.emit import emit
from compress.measure import race
from compress.passes.place import place
from compress.pipeline import Bench, Pass, State
from compress.scheme import HEAVY, Compute, Scheme
from skills import ort
from skills.errors import FormatError

LEAST_GAIN = 1.02  # what a way with int8 must win over float: less is noise, and then the simpler float form wins
MORE_GAIN = 1.04  # what a way with a layer more in float must win over the simpler ones


def candidates(state: State, bench: Bench) -> dict[str, Scheme]:
    """Return the ways worth racing, the simpler first; the first is all int8, the last all float."""
    planned, seen = state.planned().layers, state.seen()
    first = _first_layers(state.model) & {layer.node for layer in planned if layer.compute == "int8"}
    deep = any(layer.depthwise and layer.compute == "int8" for layer in planned)
    depthwise: Sequence[Compute] = ("int8", "float") if deep else ("int8",)
    ways = {}
    for stay_float in (frozenset[str](), first) if first else (first,):
        for compute in depthwise:
            but = ["depthwise layers"] * (compute == "float") + ["the first layer"] * bool(stay_float)
            name = "int8" + (f" but for {' and '.join(but)}" if but else "")
            ways[name] = place(
                state.model, seen, bench.profile, depthwise=compute, others="int8", stay_float=stay_float
            )
    return ways | {"float": place(state.model, seen, bench.profile, depthwise="float", others="float")}


def quickest(times_ms: Mapping[str, float]) -> str:
    """Return the way to take; `times_ms` has the simpler ones first, and float, the simplest of all, last. Pure.

    Float is left for a way that wins `LEAST_GAIN` over it. Of several such ways a later one is taken where it is faster by
    `MORE_GAIN` than the one taken so far.
    """
    *names, last = times_ms
    faster = [name for name in names if times_ms[last] >= LEAST_GAIN * times_ms[name]]
    best = faster[0] if faster else last
    for name in faster[1:]:
        if times_ms[best] >= MORE_GAIN * times_ms[name]:
            best = name
    return best


def _first_layers(model: Any) -> frozenset[str]:
    """Return the convolutions and products that read what comes in."""
    fed = {item.name for item in model.graph.input}
    return frozenset(node.name for node in model.graph.node if node.op_type in HEAVY and node.input[0] in fed)


def _run(state: State, bench: Bench) -> State:
    scheme, profile = state.planned(), bench.profile
    if not scheme.layers:
        return state
    if profile.runtime != "onnxruntime" or profile.arch != platform.machine():
        note = f"int8 was not raced against float: this machine ({platform.machine()}) is not {profile.name}."
        return dataclasses.replace(state, notes=(*state.notes, note))
    ways = candidates(state, bench)
    if bench.planned is not None and GUARD.name in bench.planned.choices:
        return _taken(state, ways, bench.planned.choices[GUARD.name], "As the recipe says: {}.")
    sessions = {
        name: ort.session(emit(state.model, way, state.seen()).SerializeToString(), bench.threads)
        for name, way in ways.items()
    }
    bench.say(0.3, "")
    sample = whole_runs(next(iter(sessions.values())).inputs[0], bench.splits.calibrate.x)
    times = race(sessions, sample, bench.timing_rounds)
    taken = quickest({name: times[name].p50_ms for name in ways})
    best = (
        taken
        if taken != "float"
        else min((name for name in ways if name != "float"), key=lambda name: times[name].p50_ms)
    )
    note = f"Raced on this machine: {best} is {times['float'].p50_ms / times[best].p50_ms:.2f} times as fast as float."
    if taken == "float":
        note += " Too little: layers compute in float, and only their weights are stored as whole numbers."
    return _taken(state, ways, taken, note)


def _taken(state: State, ways: dict[str, Scheme], name: str, note: str) -> State:
    if name not in ways:
        raise FormatError(f"the recipe chooses '{name}' for this model, which has {', '.join(ways)}")
    choices = {**state.choices, GUARD.name: name}
    return dataclasses.replace(state, scheme=ways[name], notes=(*state.notes, note.format(name)), choices=choices)


GUARD = Pass("guard", "racing int8 against float", _run)
