"""Cancel the shift that rounding gives each layer's mean answer, where that brings the model closer to the original."""

import dataclasses

from compress.emit import emit, widths
from compress.measure import answers, divergence
from compress.pipeline import Bench, Pass, State
from compress.scheme import Scheme
from skills import ort


def distance(state: State, scheme: Scheme, bench: Bench) -> float:
    """Return how far the emitted scheme answers from the original on calibration data."""
    session = ort.session(emit(state.model, scheme, state.seen()).SerializeToString(), bench.threads)
    return divergence(bench.original_calibrate, answers(session, bench.splits.calibrate.x))


def _run(state: State, bench: Bench) -> State:
    scheme = state.planned()
    if not scheme.layers:
        return state
    lowest = 4 if 4 in widths(state.model, bench.profile) and bench.goal != "latency" else 8
    tried = scheme.with_bits({layer.node: lowest for layer in scheme.layers})
    without = distance(state, tried, bench)
    bench.say(0.5, "")
    corrected = distance(state, dataclasses.replace(tried, correct_bias=True), bench)
    keep = corrected < without
    word = "kept" if keep else "not kept"
    note = f"Bias correction: distance to the original {without:.4g} without, {corrected:.4g} with it: {word}."
    return dataclasses.replace(state, scheme=dataclasses.replace(scheme, correct_bias=keep), notes=(*state.notes, note))


BIAS = Pass("bias", "correcting biases", _run)
