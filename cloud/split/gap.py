"""How far a chain of segments may be from the whole model, and how far it is."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cloud.split.graph import Flow
from cloud.split.segment import Pieces
from skills import ort
from skills.errors import FormatError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

ROUNDING = 1e-5  # of the largest value: segments are optimised apart, so sums may round differently in the last places
HALF_ROUNDING = 1e-4  # where tensors have 16 bits


def allowed_gap(flow: Flow, pieces: Pieces) -> float:
    """Return by how much a chain may differ from the whole, as a share of the largest value.

    Not at all where a quantized model is cut at its codes: whole numbers do not round on their way.
    """
    crossing = [live.dtype for tensors in pieces.live[1:] for live in tensors]
    quantized = any(op.kind in ("QuantizeLinear", "QLinearConv") for op in flow.ops)
    if quantized and crossing and not any(dtype.startswith(("FP", "BF")) for dtype in crossing):
        return 0.0
    ends = [live.dtype for live in pieces.outputs]
    return HALF_ROUNDING if {"FP16", "BF16"} & {*crossing, *ends} else ROUNDING


def largest_gap(
    chain: ort.Chain, samples: "Sequence[Arrays]", truths: "Sequence[Arrays]", allowed: float = ROUNDING
) -> float:
    """Return the largest difference between the chain of segments and the whole model.

    `allowed` is the largest one that is let pass, as a share of the largest value, or of 1 where that is less.

    Raises:
        FormatError: it is more, so the model cannot be cut this way.
    """
    import numpy as np

    worst = 0.0
    for sample, truth in zip(samples, truths, strict=True):
        for name, found in chain.run(sample).items():
            right = np.asarray(truth[name], np.float64)
            gap = float(np.abs(np.asarray(found, np.float64) - right).max(initial=0.0))
            if gap > allowed * max(1.0, float(np.abs(right).max(initial=0.0))):
                raise FormatError(
                    f"the segments' output {name!r} differs from the whole model's by {gap:.2g}: it cannot be split"
                )
            worst = max(worst, gap)
    return worst
