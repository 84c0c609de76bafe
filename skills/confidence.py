"""How sure a small model is of its answer. numpy comes in with the first call."""

from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray

Scores = Literal["classes", "detections"]
LEAST, MOST = 1e-7, 1 - 1e-7


def confidence(scores: "NDArray[Any]", kind: Scores, temperature: float) -> float:
    """Return from 0 (ask somebody else) to 1 (certain) for one input.

    `classes`: logits over classes; the calibrated share of the likeliest one. `detections`: scores from 0 to 1 of whatever
    was found; the highest one. Nothing found, nothing known: an empty array or NaN is 0, so a miss is asked about.
    """
    import numpy as np

    values = np.asarray(scores, np.float64).ravel()
    if not values.size or not np.isfinite(values).all():
        return 0.0
    if kind == "detections":
        best = min(max(float(values.max()), LEAST), MOST)
        return float(1 / (1 + np.exp(-np.log(best / (1 - best)) / temperature)))
    shifted = (values - values.max()) / temperature
    return float(1 / np.exp(shifted).sum())
