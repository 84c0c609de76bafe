"""Whose turn it is at the tail, and how many take it together."""

from hypothesis import given
from hypothesis import strategies as st

from cloud.tail.batching import LaneQueue


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 3)), max_size=20), st.floats(0, 10), st.integers(1, 5))
def test_what_must_begin_first_is_next_with_others_of_its_lane_and_the_late_come_back(
    jobs: list[tuple[float, int]], now: float, most: int
) -> None:
    queue: LaneQueue[tuple[float, int]] = LaneQueue(20)
    for job in jobs:
        assert queue.push(job, job[0], lane=job[1])
    turn = queue.pop(now, lambda first, waiting: most)
    assert sorted(turn.expired) == sorted(job for job in jobs if job[0] <= now)
    in_time = [job for job in jobs if job[0] > now]
    assert bool(turn.jobs) is bool(in_time)
    if turn.jobs:
        first = turn.jobs[0]
        assert first[0] == min(job[0] for job in in_time)
        lane = sorted(job for job in in_time if job[1] == first[1])
        assert list(turn.jobs) == lane[: min(most, len(lane))]
    assert len(queue) == len(in_time) - len(turn.jobs)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 2)), max_size=40), st.integers(1, 6))
def test_no_job_is_lost_or_served_twice_and_never_more_wait_than_may(
    steps: list[tuple[bool, int, int]], bound: int
) -> None:
    queue: LaneQueue[int] = LaneQueue(bound)
    inside: set[int] = set()
    for number, (push, at, lane) in enumerate(steps):
        if push:
            assert queue.push(number, at, lane) is (len(inside) < bound)
            inside |= {number} if len(inside) < bound else set()
        else:
            turn = queue.pop(at, lambda first, waiting: waiting)
            out = [*turn.jobs, *turn.expired]
            assert len(set(out)) == len(out)
            assert set(out) <= inside
            inside -= set(out)
        assert len(queue) == len(inside)
    assert set(queue.clear()) == inside
    assert len(queue) == 0


def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    queue: LaneQueue[str] = LaneQueue(2)
    assert queue.push("a", 5)
    assert queue.push("b", 4)
    assert not queue.push("c", 1)
    assert [queue.pop(0).jobs, queue.pop(0).jobs, queue.pop(0).jobs] == [("b",), ("a",), ()]


def test_equal_ones_are_served_in_order_of_arrival() -> None:
    queue: LaneQueue[str] = LaneQueue(9)
    for name in "abc":
        queue.push(name, 1.0, lane=name)
    assert [queue.pop(0).jobs for _ in "abc"] == [("a",), ("b",), ("c",)]
