"""Scores of units, on a group small enough to do the sums by hand."""

import numpy as np
import pytest

from compress import saliency
from compress.channels import Group, Member, rounded

WEIGHTS = {"w": np.array([[3.0, 0.0], [0.0, 1.0]]), "b": np.array([4.0, 0.0]), "v": np.array([[1.0, 2.0, 0.0, 1.0]])}
UNITS = np.array([[0], [1]])
GROUP = Group(
    2,
    (
        Member("first", "w", 1, 0, UNITS, "makes", "t"),
        Member("first", "b", 2, 0, UNITS, "makes", "t"),
        Member("second", "v", 1, 1, np.array([[0, 1], [2, 3]]), "reads", "flat"),  # each channel owns two columns
    ),
)


def test_contribution_is_the_share_of_what_the_readers_take_in() -> None:
    power = {"flat": np.array([1.0, 1.0, 5.0, 3.0])}
    assert saliency.contribution(WEIGHTS, GROUP, power).tolist() == pytest.approx([5 / 8, 3 / 8])


def test_makers_and_readers_are_named_once() -> None:
    assert GROUP.makers == ("first",)
    assert GROUP.readers == ("second",)


@pytest.mark.parametrize(
    ("count", "multiple", "least", "want"), [(13, 8, 1, 16), (11, 8, 1, 8), (1, 8, 1, 8), (3, 8, 9, 16), (5.4, 1, 1, 5)]
)
def test_a_count_is_rounded_to_the_nearest_multiple_but_never_below_the_least(
    count: float, multiple: int, least: int, want: int
) -> None:
    assert rounded(count, multiple, least) == want
