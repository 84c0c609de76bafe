"""When a tail runs what is behind a cut as one graph: where that was measured to be faster, is soon done and answers alike."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from cloud.tail.joined import joined
from cloud.tail.pace import Pace
from cloud.tail.store import Loaded
from skills.coding import Live
from skills.errors import FormatError
from skills.split_plan import Cut, Millis, Plan, Segment

NO_TIME = Millis(0, 0)
NAMES = "xabcy"
SIZES = (10, 20, 30, 40)  # bytes of the four segments


def plan() -> Plan:
    live = [Live(name, "FP32", (-1, 4)) for name in NAMES]
    segments = tuple(
        Segment(f"{at}.onnx", "0" * 64, size, (NAMES[at],), (NAMES[at + 1],)) for at, size in enumerate(SIZES)
    )
    cuts = [Cut(f"c{at}" if at else "input", at, NO_TIME, NO_TIME, (live[at],)) for at in range(4)]
    return Plan("0" * 64, (live[0],), (live[-1],), segments, (*cuts, Cut("local", 4, NO_TIME, NO_TIME)))


class Chain:
    """A part of the model from `first` on, each of whose runs takes `cost` seconds of the test's clock."""

    def __init__(self, clock: "Clock", cost: float, first: int = 0, adds: float = 1.0) -> None:
        self.clock, self.cost, self.first, self.adds = clock, cost, first, adds

    def run(self, values: Mapping[str, Any], start: int = 0, stop: int | None = None) -> dict[str, Any]:
        (array,) = values.values()
        self.clock.now += self.cost
        upto = 4 if stop is None else stop
        return {NAMES[upto]: array + self.adds * (upto - self.first - start)}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def found(clock: Clock, cost: float, join: Callable[[int], Any], budget_s: float = 10.0) -> dict[int, Any]:
    return joined(plan(), Chain(clock, cost), join, budget_s, clock)  # type: ignore[arg-type]


def test_what_is_faster_as_one_graph_is_joined_from_the_input_on_while_there_is_room(clock: Clock) -> None:
    made = found(clock, 0.010, lambda after: Chain(clock, 0.009, after))
    # 100 + 90 bytes of the 200 that the joined graphs may take; the next 70 would be too many.
    assert sorted(made) == [0, 1]


@pytest.mark.parametrize(
    ("apart", "one"), [(0.010, 0.0099), (0.2, 0.1), (1.0, 0.5)], ids=["no gain", "long", "very long"]
)
def test_what_gains_nothing_or_takes_long_stays_in_segments(clock: Clock, apart: float, one: float) -> None:
    assert found(clock, apart, lambda after: Chain(clock, one, after)) == {}


def test_a_graph_that_answers_otherwise_is_not_used(clock: Clock) -> None:
    assert found(clock, 0.010, lambda after: Chain(clock, 0.001, after, adds=1.1)) == {}


def test_what_cannot_be_joined_stays_in_segments_and_the_rest_is_tried(clock: Clock) -> None:
    def join(after: int) -> Chain:
        if after == 0:
            raise FormatError("no")
        return Chain(clock, 0.001, after)

    assert sorted(found(clock, 0.010, join)) == [1, 2]


def test_where_whole_numbers_cross_every_cut_the_answer_must_be_the_same_bit_for_bit_on_several_requests(
    clock: Clock,
) -> None:
    def nearly(after: int) -> Chain:
        return Chain(clock, 0.001, after, adds=1 + 1e-6)

    class Once(Chain):
        """Right on the first request, and a little off on all others."""

        def run(self, values: Mapping[str, Any], start: int = 0, stop: int | None = None) -> dict[str, Any]:
            result = super().run(values, start, stop)
            self.adds = 1 + 1e-6
            return result

    floats = plan()
    codes = dataclasses.replace(
        floats,
        cuts=tuple(
            dataclasses.replace(cut, tensors=tuple(dataclasses.replace(one, dtype="UINT8") for one in cut.tensors))
            if cut.after
            else cut
            for cut in floats.cuts
        ),
    )
    chain = Chain(clock, 0.010)
    for asked, join, expected in (
        (floats, nearly, [0, 1]), (codes, nearly, []), (codes, lambda after: Once(clock, 0.001, after), []),
        (codes, lambda after: Chain(clock, 0.001, after), [0, 1]),
    ):  # fmt: skip
        assert sorted(joined(asked, chain, join, 10.0, clock)) == expected  # type: ignore[arg-type]


def test_a_request_larger_than_what_is_soon_done_as_one_graph_runs_in_segments(clock: Clock) -> None:
    chain = Chain(clock, 0.010)
    made = found(clock, 0.010, lambda after: Chain(clock, 0.009, after))  # five rows take 45 ms
    loaded = Loaded("0" * 16, plan(), chain, Pace(4), made)  # type: ignore[arg-type]
    for rows, reached in ((1, 4), (5, 4), (6, 1), (100, 1)):
        values, after = loaded.run({"x": np.zeros((rows, 4), np.float32)}, 0, 1.0)
        assert (list(values), after) == ([NAMES[reached]], reached)


def test_measuring_ends_when_its_time_is_over(clock: Clock) -> None:
    assert sorted(found(clock, 0.010, lambda after: Chain(clock, 0.005, after), budget_s=0.05)) == [0]


def test_numbers_that_are_no_floats_must_be_the_very_same(clock: Clock) -> None:
    class Counting(Chain):
        def run(self, values: Mapping[str, Any], start: int = 0, stop: int | None = None) -> dict[str, Any]:
            return {name: np.rint(array).astype(np.int64) for name, array in super().run(values, start, stop).items()}

    chain = Counting(clock, 0.010)
    assert sorted(joined(plan(), chain, lambda after: Counting(clock, 0.001, after), 1.0, clock)) == [0, 1]  # type: ignore[arg-type, return-value]
    assert joined(plan(), chain, lambda after: Counting(clock, 0.001, after, 2.0), 1.0, clock) == {}  # type: ignore[arg-type, return-value]
