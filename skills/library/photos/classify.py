"""The photo classifier's control code: pixels to the model's input, scores to the likeliest class and how sure it is."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = Mapping[str, NDArray[Any]]

MEAN, STD = np.float32(127), np.float32(128)


def classify(inputs: "Arrays", model: Callable[..., "Arrays"]) -> "Arrays":
    """Return the number of the likeliest ImageNet class of each RGB photo, and its softmax probability."""
    logits = model(image=normalised(inputs["image"]))["logits"]
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    return {"label": scores.argmax(axis=1).astype(np.int64), "confidence": scores.max(axis=1).astype(np.float32)}


def normalised(pictures: "NDArray[np.uint8]") -> "NDArray[np.float32]":
    """Return what the model takes, FP32 [N,3,224,224], for pictures UINT8 [N,224,224,3]."""
    turned = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)).astype(np.float32)
    turned -= MEAN
    turned /= STD
    return turned
