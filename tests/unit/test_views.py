"""What a student sees of a training input: moved in ways that depend on seed, view and row alone."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from compress.views import Views, movable, moved
from skills.ort import Port

SHAPES = {"pictures": (3, 16, 16), "channels last": (16, 16, 3), "small pictures": (1, 8, 8), "series": (6, 32)}


def some(shape: tuple[int, ...], count: int = 40) -> Any:
    return np.random.default_rng(3).standard_normal((count, *shape)).astype(np.float32)


class Teacher:
    """Answers the sum of each input, and counts how often it is asked."""

    inputs = (Port("x", "float32", (-1, 1, 8, 8)),)
    outputs = (Port("y", "float32", (-1, 1)),)
    load_ms = 0.0

    def __init__(self) -> None:
        self.asked = 0

    def run(self, feeds: Mapping[str, Any], names: list[str] | None = None) -> dict[str, Any]:
        self.asked += len(feeds["x"])
        return {"y": feeds["x"].reshape(len(feeds["x"]), -1).sum(1, keepdims=True)}


def remembering(store: dict[str, bytes]) -> Callable[[str, Callable[[], bytes]], bytes]:
    return lambda key, make: store[key] if key in store else store.setdefault(key, make())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_input_is_moved_alike_whatever_batch_it_is_in(shape: tuple[int, ...]) -> None:
    x = some(shape)
    rows = np.arange(len(x))
    whole = moved(x, rows, 2, seed=5)
    some_rows = np.array([31, 3, 17])
    assert np.array_equal(moved(x[some_rows], some_rows, 2, seed=5), whole[some_rows])
    assert not np.array_equal(whole, moved(x, rows, 3, seed=5))
    assert not np.array_equal(whole, moved(x, rows, 2, seed=6))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_moving_keeps_shape_and_dtype_and_leaves_its_input_alone(shape: tuple[int, ...]) -> None:
    for dtype in (np.float32, np.float16):
        x = some(shape).astype(dtype)
        before = x.copy()
        after = moved(x, np.arange(len(x)), 1, seed=0)
        assert (after.dtype, after.shape) == (x.dtype, x.shape)
        assert np.array_equal(x, before)
        assert after is not x


def test_the_first_view_of_all_is_the_inputs_themselves() -> None:
    x = some((3, 16, 16))
    assert moved(x, np.arange(len(x)), 0, seed=0) is x


@pytest.mark.parametrize("shape", [(3, 16, 16), (16, 16, 3)])
def test_pictures_are_shifted_and_mirrored_in_space_and_never_across_channels(shape: tuple[int, ...]) -> None:
    x = np.zeros((64, *shape), np.float32)
    channel = 0 if shape[0] == 3 else 2
    np.moveaxis(x, 1 + channel, 1)[:, 1] = 1.0
    after = np.moveaxis(moved(x, np.arange(64), 1, seed=0), 1 + channel, 1)
    assert not after[:, [0, 2]].any()
    assert after[:, 1].min(axis=(1, 2)).max() == 1  # some stay where they are
    assert set(np.unique(after)) == {0.0, 1.0}  # what is shifted in is zero


def test_a_series_is_moved_in_time_alone() -> None:
    x = np.zeros((64, 6, 32), np.float32)
    x[:, 2] = 1.0
    after = moved(x, np.arange(64), 1, seed=0)
    assert not after[:, [0, 1, 3, 4, 5]].any()
    assert (after[:, 2] > 0).sum(axis=1).min() >= 32 - 32 // 8


def test_what_is_no_series_or_picture_or_not_float_is_shown_as_it_is() -> None:
    assert not movable(np.zeros((5, 7), np.float32))
    assert not movable(np.zeros((5, 3, 8, 8), np.uint8))
    x = np.arange(35, dtype=np.float32).reshape(5, 7)
    teacher: Any = Teacher()
    views = Views(x, teacher, 4, 0, remembering({}))
    assert views.count == 1
    assert np.array_equal(views.inputs(0, np.array([3, 1])), x[[3, 1]])


def test_answers_of_a_size_that_the_teacher_leaves_open_keep_their_shape() -> None:
    class Picture(Teacher):
        outputs = (Port("y", "float32", (-1, 1, -1, -1)),)

        def run(self, feeds: Mapping[str, Any], names: list[str] | None = None) -> dict[str, Any]:
            return {"y": feeds["x"][:, :, ::2, ::4]}

    teacher: Any = Picture()
    assert Views(some((1, 8, 8)), teacher, 2, 0, remembering({})).answers(1).shape == (40, 1, 4, 2)


def test_the_teacher_answers_each_view_once_and_what_it_said_is_kept() -> None:
    x, kept = some((1, 8, 8)), dict[str, bytes]()
    teacher: Any = Teacher()
    views = Views(x, teacher, 3, 0, remembering(kept))
    said = [views.answers(view) for view in range(3)]
    for view, answers in enumerate(said):
        rows = np.arange(len(x))
        assert np.allclose(answers[:, 0], views.inputs(view, rows).reshape(len(x), -1).sum(1), atol=1e-4)
    assert teacher.asked == 3 * len(x)
    again = Views(x, teacher, 3, 0, remembering(kept))
    assert np.array_equal(again.answers(2), said[2])
    assert teacher.asked == 3 * len(x)
