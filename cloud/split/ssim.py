"""How alike two pictures are to the eye: mean structural similarity (Wang et al., 2004) over a plain window."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW = 7
K1, K2 = 0.01, 0.03


def ssim(first: "NDArray[Any]", second: "NDArray[Any]", data_range: float = 1.0) -> float:
    """Return the mean over windows of 7 x 7, channels and pictures, of arrays (N, C, H, W); 1 is the same picture.

    Equal to scikit-image's `structural_similarity` with its defaults. Smaller pictures have one window as large as they are.
    """
    import numpy as np

    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    width = min(WINDOW, *one.shape[2:])
    count = width * width
    mean_1, mean_2 = _means(one, width), _means(two, width)
    sample = count / (count - 1) if count > 1 else 1.0
    var_1 = sample * (_means(one * one, width) - mean_1**2)
    var_2 = sample * (_means(two * two, width) - mean_2**2)
    both = sample * (_means(one * two, width) - mean_1 * mean_2)
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    likeness = (2 * mean_1 * mean_2 + c1) * (2 * both + c2) / ((mean_1**2 + mean_2**2 + c1) * (var_1 + var_2 + c2))
    return float(likeness.mean())


def _means(array: "NDArray[Any]", width: int) -> "NDArray[Any]":
    """Return the mean of every window, from sums along both axes."""
    import numpy as np

    for axis in (2, 3):
        sums = np.cumsum(array, axis=axis)
        sums = np.concatenate([np.zeros_like(np.take(sums, [0], axis)), sums], axis=axis)
        size = sums.shape[axis]
        array = (np.take(sums, range(width, size), axis) - np.take(sums, range(size - width), axis)) / width
    return array
