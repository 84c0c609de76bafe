"""Round each layer's weights with care for what it answers, and correct its bias: where that brings the model closer.

This is sequential bias correction (Nagel et al., arXiv 1906.04721, section 4.2, layer after layer, each fed by those
already rounded) and at the same time a better rounding than to the nearest; see `compress/passes/reconstruct.py`.
"""

import dataclasses

from compress.emit import emit
from compress.measure import answers, divergence
from compress.passes.reconstruct import rebuild
from compress.pipeline import Bench, Pass, State
from compress.profiles import saturates_here
from compress.scheme import Scheme
from skills import ort
from skills.errors import DeadlineExceeded, FormatError


def distance(state: State, scheme: Scheme, bench: Bench) -> float:
    """Return how far the emitted scheme answers from the original on calibration data."""
    file = emit(state.model, scheme, state.seen()).SerializeToString()
    session = ort.session(file, bench.threads, exact=saturates_here(bench.profile))
    return divergence(
        bench.original_calibrate, answers(session, bench.splits.calibrate.x), classes=bench.metric.classes
    )


def _run(state: State, bench: Bench) -> State:
    scheme = state.planned()
    if not scheme.layers:
        return state
    try:
        better = rebuild(
            state.model, scheme, bench.splits.calibrate.x, lambda share: bench.say(0.8 * share, ""), bench.left
        )
    except (DeadlineExceeded, FormatError) as error:  # or a graph with operators that have no torch counterpart
        note = f"Weights are rounded to nearest and biases not corrected: {error}"
        return dataclasses.replace(state, notes=(*state.notes, note))
    without, corrected = (distance(state, tried, bench) for tried in (scheme, better))
    keep = corrected < without
    note = (
        f"Rounding layer after layer, biases corrected: distance to the original {without:.4g} without, "
        f"{corrected:.4g} with it: {'kept' if keep else 'not kept'}."
    )
    return dataclasses.replace(state, scheme=better if keep else scheme, notes=(*state.notes, note))


BIAS = Pass("bias", "correcting biases", _run)
