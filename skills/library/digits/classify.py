"""Read handwritten digits: 8x8 pictures with values 0 to 16 in, the digit and how sure the net is out."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[Any]]
INK = 16.0  # the darkest value of a pixel in scikit-learn's digits
SIZE = 16  # the net looks at 16x16


def prepare(image: NDArray[Any]) -> NDArray[np.float32]:
    """Return what the net takes: N x 1 x 16 x 16 between 0 and 1, each pixel doubled in both directions."""
    return np.repeat(np.repeat(image, 2, axis=1), 2, axis=2).astype(np.float32)[:, None] / np.float32(INK)


def classify(inputs: Arrays, model: Callable[..., Arrays]) -> Arrays:
    """Return `digit` and `confidence`, the probability that the net gives to it."""
    logits = model(x=prepare(inputs["image"]))["logits"].astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    odds /= odds.sum(axis=1, keepdims=True)
    return {"digit": logits.argmax(axis=1).astype(np.int64), "confidence": odds.max(axis=1).astype(np.float32)}
