"""Keep int8 only where it is faster: race the ways to compute on this machine and take the quickest.

int8 depthwise convolutions are slower than float ones on some machines, and a net of a few small layers can lose more
on its seams than its kernels win. The race is between whole models, since per-node times do not add up.
"""

import dataclasses
import platform

from compress.emit import emit
from compress.measure import race
from compress.passes.place import place
from compress.pipeline import Bench, Pass, State
from compress.scheme import Compute, Scheme
from skills import ort
from skills.errors import FormatError

LEAST_GAIN = 1.02  # less than this is noise, and then the simpler float form wins


def candidates(state: State, bench: Bench) -> dict[str, Scheme]:
    """Return the ways worth racing; the first is all int8, the last all float."""
    kinds: dict[str, tuple[Compute, Compute]] = {"int8": ("int8", "int8")}
    if any(layer.depthwise and layer.compute == "int8" for layer in state.planned().layers):
        kinds["int8 but for depthwise layers"] = ("float", "int8")
    kinds["float"] = ("float", "float")
    seen = state.seen()
    return {
        name: place(state.model, seen, bench.profile, depthwise=depthwise, others=others)
        for name, (depthwise, others) in kinds.items()
    }


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
    times = race(sessions, bench.splits.calibrate.x[:1], bench.timing_rounds)
    fastest = min((name for name in ways if name != "float"), key=lambda name: times[name].p50_ms)
    gain = times["float"].p50_ms / times[fastest].p50_ms
    note = f"Raced on this machine: {fastest} is {gain:.2f} times as fast as float."
    if gain < LEAST_GAIN:
        fastest = "float"
        note += " Too little: layers compute in float, and only their weights are stored as whole numbers."
    return _taken(state, ways, fastest, note)


def _taken(state: State, ways: dict[str, Scheme], name: str, note: str) -> State:
    if name not in ways:
        raise FormatError(f"the recipe chooses '{name}' for this model, which has {', '.join(ways)}")
    choices = {**state.choices, GUARD.name: name}
    return dataclasses.replace(state, scheme=ways[name], notes=(*state.notes, note.format(name)), choices=choices)


GUARD = Pass("guard", "racing int8 against float", _run)
