"""What a student learns from: the training inputs moved a little, in several ways, and what the teacher says to each.

The teacher answers the very inputs that the student sees, so moving them can never make an answer wrong: a consistent
teacher (Beyer et al., CVPR 2022, arXiv 2106.05237). The inputs as they are stay out: the teacher mostly knows them by heart,
and what it says to them tells little. Each view is answered once and kept, which makes it as cheap as a label.
"""

import functools
import hashlib
from collections.abc import Callable

import numpy as np

from compress.data import whole_runs
from compress.graph import Array
from compress.measure import Runner, answers

SHIFT = 8  # an input is moved by at most a part in so many of its size
FLIPPED_FROM = 16  # pixels: pictures from this size on are also mirrored
GAIN = 0.1
COLOURS = (1, 3, 4)
ASKED_AT_ONCE = 2000


class Views:
    """The training inputs `x` in `count` views, or as they are where nothing is known of how they may be moved.

    `kept(key, make)` returns the bytes kept under a key, or makes and keeps them; `classes` says whether the teacher's answers
    are rows of class scores.
    """

    def __init__(
        self, x: Array, teacher: Runner, count: int, seed: int, kept: Callable[[str, Callable[[], bytes]], bytes],
        *, classes: bool = True,
    ) -> None:  # fmt: skip
        self.x, self.teacher, self.seed, self.kept = x, teacher, seed, kept
        self.first = 1 if movable(x) else 0
        self.count, self.classes = count if movable(x) else 1, classes
        self._answers: dict[int, Array] = {}

    def inputs(self, view: int, rows: Array) -> Array:
        """Return the inputs of these rows as this view shows them."""
        return moved(self.x[rows], rows, self.first + view, self.seed)

    def answers(self, view: int, say: Callable[[float], None] = lambda _share: None) -> Array:
        """Return the teacher's answers to every row of a view."""
        if view not in self._answers:
            known = hashlib.sha256(f"{self.seed}:{view}:{len(self.x)}".encode()).hexdigest()[:16]
            raw = self.kept(f"teacher-{known}", lambda: self._ask(view, say).tobytes())
            self._answers[view] = np.frombuffer(raw, np.float32).reshape(len(self.x), *self._size)
        return self._answers[view]

    @functools.cached_property
    def _size(self) -> tuple[int, ...]:
        """The teacher's answer to one input, where its graph leaves sizes open that of the first."""
        said = self.teacher.outputs[0].shape[1:]
        if -1 not in said:
            return tuple(said)
        return answers(self.teacher, whole_runs(self.teacher.inputs[0], self.x, 1)).shape[1:]

    def _ask(self, view: int, say: Callable[[float], None]) -> Array:
        found = []
        for at in range(0, len(self.x), ASKED_AT_ONCE):
            rows = np.arange(at, min(at + ASKED_AT_ONCE, len(self.x)))
            found.append(answers(self.teacher, self.inputs(view, rows)).astype(np.float32))
            say((rows[-1] + 1) / len(self.x))
        return np.concatenate(found)


def movable(x: Array) -> bool:
    """Return whether inputs are series or pictures, which can be moved in time or space."""
    return x.dtype.kind == "f" and x.ndim in (3, 4)


def moved(x: Array, rows: Array, view: int, seed: int) -> Array:
    """Return inputs (N, …) shifted and, if pictures, perhaps mirrored; view 0 is the inputs themselves.

    Which way depends on the seed, the view and each input's row alone. What is shifted in is zero.
    """
    if view == 0:
        return x
    axes = _space(x.shape)
    chances = np.random.default_rng([seed, view]).random((int(rows.max()) + 1, 1 + len(axes)))[rows]
    result = np.zeros_like(x)
    flips = len(axes) == 2 and min(x.shape[axis] for axis in axes) >= FLIPPED_FROM
    for at in range(len(x)):
        source = x[at]
        if flips and chances[at, 0] < 0.5:
            source = np.flip(source, axes[1] - 1)
        into, out_of = [slice(None)] * source.ndim, [slice(None)] * source.ndim
        for axis, chance in zip(axes, chances[at, 1:], strict=True):
            size = x.shape[axis]
            most = size // SHIFT
            by = round((2 * chance - 1) * most)
            into[axis - 1] = slice(max(0, by), size + min(0, by))
            out_of[axis - 1] = slice(max(0, -by), size + min(0, -by))
        result[at][tuple(into)] = source[tuple(out_of)]
        if not flips:
            result[at] *= 1 + GAIN * (2 * chances[at, 0] - 1)
    return result


def _space(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes that are space or time: not the batch, not the channels."""
    if len(shape) == 3:
        return (2,)
    return (1, 2) if shape[3] in COLOURS and shape[1] not in COLOURS else (2, 3)
