"""The photo classifier's control code: scores to the likeliest class and how sure the model is of it."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]


def classify(inputs: "Arrays", model: Callable[..., "Arrays"]) -> "Arrays":
    """Return the number of the likeliest ImageNet class of each photo, and its softmax probability."""
    logits = model(image=inputs["image"])["logits"]
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    return {"label": scores.argmax(axis=1).astype(np.int64), "confidence": scores.max(axis=1).astype(np.float32)}
