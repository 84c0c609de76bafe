"""Following a rollout from outside."""

import pytest

from cloud import watch
from cloud.views import MemberView, RolloutView
from skills.errors import DeadlineExceeded, NotReached, Refused


def member(device: str, stage: str, reason: str = "", *, online: bool = True) -> MemberView:
    return MemberView(device, "1.0.0", None, False, stage, reason, online, None, {}, 0.0, 0, 0)


def rollout(state: str, *members: MemberView, reason: str = "") -> RolloutView:
    return RolloutView(7, "digits", "1.0.0", "push", "all", 1, state, False, reason, 0.0, {}, members)


class Course:
    """A controller that shows one state after the other, and the clock that goes on meanwhile."""

    def __init__(self, *states: RolloutView) -> None:
        self.states, self.now = list(states), 0.0

    def rollout(self, number: int) -> RolloutView:
        assert number == 7
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def follow(self, deadline_s: float = 10.0) -> RolloutView:
        return watch.follow(self, 7, deadline_s, clock=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_it_is_watched_until_it_ends_also_through_a_pause() -> None:
    ended = Course(rollout("running"), rollout("paused"), rollout("running"), rollout("done")).follow()
    assert ended.state == "done"


def test_an_open_rollout_at_the_deadline_is_said_to_go_on_and_who_is_missing() -> None:
    course = Course(rollout("running", member("a", "serving"), member("b", "assigned", online=False)))
    with pytest.raises(DeadlineExceeded, match="1 of 2 devices serve, b is offline; the rollout 7 goes on"):
        course.follow(3.0)
    assert course.now == pytest.approx(3.0, abs=watch.LOOK_EVERY_S)


def test_devices_that_no_variant_fits_are_no_failure() -> None:
    watch.judge(rollout("done", member("a", "serving"), member("b", "refused", "needs 24 MiB")))


def test_a_halted_rollout_is_refused_with_its_reason() -> None:
    with pytest.raises(Refused, match="the canary a failed: probe"):
        watch.judge(rollout("halted", member("a", "failed", "probe"), reason="the canary a failed: probe"))


def test_failed_devices_and_an_abort_miss_the_target() -> None:
    with pytest.raises(NotReached, match="1 of 2 devices failed, the first is b: no space"):
        watch.judge(rollout("done", member("a", "serving"), member("b", "failed", "no space")))
    with pytest.raises(NotReached, match="aborted"):
        watch.judge(rollout("aborted", member("a", "serving")))
