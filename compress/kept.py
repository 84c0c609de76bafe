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
from compress.weights import Blocks, Codes
from skills.profile import Profile


def pack(state: State) -> bytes:
    """Return all of a state but the models that were only tried."""
    arrays: dict[str, Array] = {"model": np.frombuffer(state.model.SerializeToString(), np.uint8)}
    head: dict[str, Any] = {"notes": state.notes, "passes": state.passes, "choices": dict(state.choices)}
    head["cut_short"], head["safer"] = state.cut_short, len(state.safer)
    head["harm"] = {node: list(row.items()) for node, row in state.harm.items()}
    if state.statistics is not None:
        head["seen"] = []
        for at, (name, seen) in enumerate(state.statistics.items()):
            head["seen"].append([name, float(seen.lo), float(seen.hi), float(seen.least), float(seen.most)])
            arrays[f"counts {at}"], arrays[f"mean {at}"] = seen.counts, seen.mean
    head["schemes"] = [_described(scheme, f"{at} ", arrays) for at, scheme in enumerate(_schemes(state))]
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
    statistics = None
    if "seen" in head:
        statistics = {
            name: Observed(arrays[f"counts {at}"], lo, hi, least, most, arrays[f"mean {at}"])
            for at, (name, lo, hi, least, most) in enumerate(head["seen"])
        }
    safer = head.get("safer", 0)
    schemes = [_scheme(row, f"{at} ", arrays, profile) for at, row in enumerate(head["schemes"])]
    return State(
        onnx.load_model_from_string(arrays["model"].tobytes()), statistics, schemes[0] if schemes else None, tuple(head["notes"]),
        {node: dict(row) for node, row in head["harm"].items()},
        passes=tuple(head["passes"]), choices=head["choices"], safer=tuple(schemes[1 : 1 + safer]),
        bolder=tuple(schemes[1 + safer :]), cut_short=head.get("cut_short", False),
    )  # fmt: skip


def _schemes(state: State) -> tuple[Scheme, ...]:
    return () if state.scheme is None else (state.scheme, *state.safer, *state.bolder)


def _described(scheme: Scheme, prefix: str, arrays: dict[str, Array]) -> dict[str, Any]:
    """Return a scheme without its arrays, which go into `arrays`."""
    for at, codes in enumerate(scheme.codes.values()):
        arrays[f"{prefix}values {at}"], arrays[f"{prefix}scales {at}"] = codes.values, codes.scales
    for at, bias in enumerate(scheme.biases.values()):
        arrays[f"{prefix}bias {at}"] = bias
    for at, blocks in enumerate(scheme.blocks.values()):
        arrays[f"{prefix}block values {at}"], arrays[f"{prefix}block scales {at}"] = blocks.values, blocks.scales
    return {
        "layers": [dataclasses.asdict(layer) for layer in scheme.layers],
        "ranges": {name: [float(found.lo), float(found.hi)] for name, found in scheme.ranges.items()},
        "codes": [[node, codes.axis, codes.bits] for node, codes in scheme.codes.items()],
        "biases": list(scheme.biases),
        "bits_before": dict(scheme.bits_before),
        "blocks": [[node, blocks.size] for node, blocks in scheme.blocks.items()],
    }


def _scheme(row: dict[str, Any], prefix: str, arrays: dict[str, Array], profile: Profile) -> Scheme:
    return Scheme(
        tuple(Layer(**{**layer, "shape": tuple(layer["shape"])}) for layer in row["layers"]),
        {name: Range(*limits) for name, limits in row["ranges"].items()},
        profile,
        {
            node: Codes(arrays[f"{prefix}values {at}"], arrays[f"{prefix}scales {at}"], axis, bits)
            for at, (node, axis, bits) in enumerate(row["codes"])
        },
        {node: arrays[f"{prefix}bias {at}"] for at, node in enumerate(row["biases"])},
        {
            node: Blocks(arrays[f"{prefix}block values {at}"], arrays[f"{prefix}block scales {at}"], size)
            for at, (node, size) in enumerate(row["blocks"])
        },
        row.get("bits_before", {}),
    )
