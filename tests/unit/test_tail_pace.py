"""How a tail finds its batch size: measured side by side, in bounded time, and one wherever a batch does not pay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cloud.tail.pace import Batching, Pace, measure, stacked
from skills.coding import Live
from skills.errors import FormatError
from skills.split_plan import Cut, Millis, Plan, Segment

NO_TIME = Millis(0, 0)


def plan(first: int = -1, last: int = 4) -> Plan:
    x, middle, y = (Live(name, "FP32", (first, last)) for name in ("x", "m", "y"))
    segments = tuple(
        Segment(f"{at}.onnx", "0" * 64, 1, (a,), (b,)) for at, (a, b) in enumerate((("x", "m"), ("m", "y")))
    )
    cuts = (
        Cut("input", 0, NO_TIME, NO_TIME, (x,)),
        Cut("c1", 1, NO_TIME, NO_TIME, (middle,)),
        Cut("local", 2, NO_TIME, NO_TIME),
    )
    return Plan("0" * 64, (x,), (y,), segments, cuts)


class Chain:
    """Two segments that double what they get; a run of n rows through one takes `cost(n)` seconds of the test's clock."""

    sessions = (None, None)

    def __init__(
        self, cost: Callable[[int], float], answer: Callable[[np.ndarray], np.ndarray] = lambda a: a * 2
    ) -> None:
        self.now, self.cost, self.answer, self.rows = 0.0, cost, answer, []

    def clock(self) -> float:
        return self.now

    def run(self, values: Any, start: int = 0, stop: int | None = None) -> Any:
        (array,) = values.values()
        for _ in range(start, 2 if stop is None else stop):
            self.now += self.cost(len(array))
            self.rows.append(len(array))
            array = self.answer(array)
        return {"y": array}


def measured(chain: Chain, budget_s: float = 10.0, first: int = -1, last: int = 4) -> dict[int, Batching]:
    pace = Pace(2)
    measure(plan(first, last), chain, pace, budget_s, chain.clock)  # type: ignore[arg-type]
    return dict(pace.batching)


def test_where_a_batch_takes_as_long_per_item_requests_run_one_by_one() -> None:
    found = measured(Chain(lambda rows: 0.001 * rows))
    assert [one.max_batch for one in found.values()] == [1, 1]
    assert found[0].batch_ms == pytest.approx({1: 2, 2: 4, 4: 8, 8: 16})
    assert found[0].why == "batches save less than a tenth"


def test_where_a_batch_is_cheaper_per_item_the_best_size_is_taken_per_cut() -> None:
    found = measured(Chain(lambda rows: 0.004 + 0.001 * rows + (0.05 if rows > 4 else 0)))
    assert [one.max_batch for one in found.values()] == [4, 4]


def test_a_graph_that_mixes_the_rows_of_a_batch_is_never_batched() -> None:
    found = measured(Chain(lambda rows: 0.001, lambda array: array + array.max()))
    assert {one.max_batch for one in found.values()} == {1}
    assert found[1].why == "two requests as one do not answer as two alone"


def test_a_graph_with_its_size_baked_in_is_never_batched() -> None:
    def baked(array: np.ndarray) -> np.ndarray:
        if len(array) > 1:
            raise FormatError("expected 1")
        return array

    assert {one.max_batch for one in measured(Chain(lambda rows: 0.001, baked)).values()} == {1}


@pytest.mark.parametrize("sizes", [{"first": 1}, {"last": -1}])
def test_only_where_the_first_size_alone_is_free_requests_run_as_one(sizes: dict[str, int]) -> None:
    found = measured(Chain(lambda rows: 0.001), **sizes)  # type: ignore[arg-type]
    assert {one.max_batch for one in found.values()} == {1}
    assert found[0].why == "the first size of its tensors is fixed, or another one is free"


def test_what_gives_another_number_of_rows_than_requests_is_never_batched() -> None:
    found = measured(Chain(lambda rows: 0.001, lambda array: array[:0]))  # as a detector that finds nothing in noise
    assert {one.max_batch for one in found.values()} == {1}


@pytest.mark.parametrize("seconds", [0.0001, 0.01, 0.05, 1.0, 30.0])
def test_measuring_stays_near_its_time_however_slow_the_model(seconds: float) -> None:
    chain = Chain(lambda rows: seconds * rows)
    found = measured(chain, budget_s=0.5)
    # What is needed to know anything (inputs behind the cut, two as one) is done in any case; the trials are bounded.
    assert chain.now <= 0.5 + 40 * seconds
    assert set(found) == {0, 1}
    if seconds >= 1:
        assert {one.max_batch for one in found.values()} == {1}
        assert "too long to try" in found[0].why


def test_a_batch_is_as_large_as_its_first_deadline_allows() -> None:
    pace = Pace(2)
    pace.batching = {0: Batching(4, {1: 10.0, 2: 12.0, 4: 16.0, 8: 40.0}, "")}
    assert pace.how_many(0, 9, left_s=1.0) == 4
    assert pace.how_many(0, 3, left_s=1.0) == 2
    assert pace.how_many(0, 9, left_s=0.013) == 2
    assert pace.how_many(0, 9, left_s=0.001) == 1
    assert pace.how_many(1, 9, left_s=1.0) == 1  # not measured


def test_what_no_run_was_ever_as_fast_as_is_known_to_be_too_late() -> None:
    pace = Pace(3)
    assert pace.least_s(0) == 0
    for segment, seconds in ((0, 0.02), (1, 0.01), (0, 0.03), (2, 0.01)):
        pace.ran(segment, seconds, segment + 1)
    assert pace.least_s(0) == pytest.approx(0.8 * 0.04)
    assert pace.least_s(2) == pytest.approx(0.8 * 0.01)
    assert pace.least_s(3) == 0


def test_requests_are_stacked_in_order() -> None:
    one, two = ({"a": np.full((1, 2), value)} for value in (1, 2))
    assert stacked([one])["a"] is one["a"]
    assert stacked([one, two])["a"].tolist() == [[1, 1], [2, 2]]
