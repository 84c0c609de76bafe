"""What counts as the same answers of a `.tflite` and of the graph that it came from."""

from typing import Any

import numpy as np
import pytest

from compress.interpreter import check_same
from skills.errors import SkerryError
from skills.ort import Port

CHANCE = np.random.default_rng(0)
STEP = 1 / 255
SHAPES = {"one number": (100, 1), "scores": (100, 10), "map": (100, 1, 6, 6), "vector": (100, 64)}


class Answering:
    """A model that has always the same answers."""

    load_ms = 0.0

    def __init__(self, output: Any) -> None:
        self.output, self.inputs, self.outputs = output, (Port("x", "float32", (len(output), 1)),), (
            Port("y", "float32", output.shape),
        )  # fmt: skip

    def run(self, _feeds: Any, _names: Any = None) -> Any:
        return {"y": self.output}


def check(got: Any, want: Any) -> None:
    check_same(Answering(got), Answering(want), np.zeros((len(want), 1), np.float32))


def answers(kind: str) -> Any:
    want = CHANCE.random(SHAPES[kind], np.float32)
    want.flat[:2] = 0, 1
    return want


@pytest.mark.parametrize("kind", SHAPES)
def test_what_rounding_explains_is_the_same(kind: str) -> None:
    want = answers(kind)
    check(want + CHANCE.integers(-3, 4, want.shape) * np.float32(STEP), want)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("wrong", ["other samples'", "shifted", "nan"])
def test_other_answers_than_rounding_explains_are_refused_whatever_their_shape(kind: str, wrong: str) -> None:
    want = answers(kind)
    got = {"other samples'": np.roll(want, 1, axis=0), "shifted": np.roll(want, 7), "nan": want * np.nan}[wrong]
    with pytest.raises(SkerryError, match=r"of the \.tflite's numbers are within 4 steps"):
        check(got, want)


def test_near_ties_in_what_is_no_class_score_are_no_difference() -> None:
    want = np.tile(np.linspace(0.9, 0.9 + 3 * STEP, 64, dtype=np.float32), (100, 1))
    check(want[:, ::-1], want)


def test_class_scores_count_by_their_first_choice_where_steps_are_stretched() -> None:
    want = np.eye(10, dtype=np.float32)[np.arange(100) % 10]
    check(want * np.float32(0.9) + np.float32(0.05), want)
