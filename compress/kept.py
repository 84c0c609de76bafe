"""A state as bytes and back, for the store that an interrupted run goes on from."""

import dataclasses
import io
import json
from typing import Any

import numpy as np

from compress.graph import Array
from compress.pipeline import State
from compress.scheme import Layer, Range, Scheme
from compress.statistics import Observed
from compress.weights import Codes
from skills.profile import Profile


def pack(state: State) -> bytes:
    """Return all of a state but the models that were tried."""
    arrays: dict[str, Array] = {"model": np.frombuffer(state.model.SerializeToString(), np.uint8)}
    head: dict[str, Any] = {"notes": state.notes, "passes": state.passes, "choices": dict(state.choices)}
    head["harm"] = {node: list(row.items()) for node, row in state.harm.items()}
    if state.statistics is not None:
        head["seen"] = []
        for at, (name, seen) in enumerate(state.statistics.items()):
            head["seen"].append([name, float(seen.lo), float(seen.hi), float(seen.least), float(seen.most)])
            arrays[f"counts {at}"], arrays[f"mean {at}"] = seen.counts, seen.mean
    if state.scheme is not None:
        scheme = state.scheme
        head["layers"] = [dataclasses.asdict(layer) for layer in scheme.layers]
        head["ranges"] = {name: [float(found.lo), float(found.hi)] for name, found in scheme.ranges.items()}
        head["codes"] = [[node, codes.axis, codes.bits] for node, codes in scheme.codes.items()]
        head["biases"] = list(scheme.biases)
        for at, codes in enumerate(scheme.codes.values()):
            arrays[f"values {at}"], arrays[f"scales {at}"] = codes.values, codes.scales
        arrays |= {f"bias {at}": bias for at, bias in enumerate(scheme.biases.values())}
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(raw: bytes, profile: Profile) -> State:
    """Return the state that `pack` wrote for this profile."""
    import onnx

    with np.load(io.BytesIO(raw), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    head = json.loads(arrays["head"].tobytes())
    statistics = scheme = None
    if "seen" in head:
        statistics = {
            name: Observed(arrays[f"counts {at}"], lo, hi, least, most, arrays[f"mean {at}"])
            for at, (name, lo, hi, least, most) in enumerate(head["seen"])
        }
    if "layers" in head:
        scheme = Scheme(
            tuple(Layer(**{**row, "shape": tuple(row["shape"])}) for row in head["layers"]),
            {name: Range(*limits) for name, limits in head["ranges"].items()},
            profile,
            {
                node: Codes(arrays[f"values {at}"], arrays[f"scales {at}"], axis, bits)
                for at, (node, axis, bits) in enumerate(head["codes"])
            },
            {node: arrays[f"bias {at}"] for at, node in enumerate(head["biases"])},
        )
    return State(
        onnx.load_model_from_string(arrays["model"].tobytes()), statistics, scheme, tuple(head["notes"]),
        {node: dict(row) for node, row in head["harm"].items()},
        passes=tuple(head["passes"]), choices=head["choices"],
    )  # fmt: skip
