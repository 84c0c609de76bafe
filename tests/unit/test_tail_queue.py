"""Whose turn it is at the tail."""

from hypothesis import given
from hypothesis import strategies as st

from cloud.tail.batching import DeadlineQueue


@given(st.lists(st.tuples(st.floats(0, 10), st.integers()), max_size=20), st.floats(0, 10))
def test_the_earliest_deadline_that_can_be_met_is_next_and_the_late_ones_come_back(
    jobs: list[tuple[float, int]], now: float
) -> None:
    queue: DeadlineQueue[tuple[float, int]] = DeadlineQueue(20)
    for job in jobs:
        assert queue.push(job, job[0])
    turn = queue.pop(now)
    late = [job for job in jobs if job[0] <= now]
    assert sorted(turn.expired) == sorted(late)
    in_time = [job for job in jobs if job[0] > now]
    assert (turn.job is None) is (not in_time)
    if turn.job is not None:
        assert turn.job[0] == min(job[0] for job in in_time)
        assert len(queue) == len(in_time) - 1


def test_a_full_queue_refuses_and_keeps_what_it_has() -> None:
    queue: DeadlineQueue[str] = DeadlineQueue(2)
    assert queue.push("a", 5)
    assert queue.push("b", 4)
    assert not queue.push("c", 1)
    assert [queue.pop(0).job, queue.pop(0).job, queue.pop(0).job] == ["b", "a", None]


def test_equal_deadlines_are_served_in_order_of_arrival() -> None:
    queue: DeadlineQueue[str] = DeadlineQueue(9)
    for name in "abc":
        queue.push(name, 1.0)
    assert [queue.pop(0).job for _ in "abc"] == ["a", "b", "c"]
