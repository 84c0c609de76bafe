"""Following a rollout to its end, from outside."""

import time
from collections.abc import Callable
from typing import Protocol

from cloud.views import RolloutView
from skills.errors import DeadlineExceeded, NotReached, Refused

LOOK_EVERY_S = 0.25
OPEN = ("running", "paused")


class Controller(Protocol):
    """What watching needs of the API."""

    def rollout(self, number: int) -> RolloutView: ...


def follow(
    client: Controller,
    number: int,
    deadline_s: float,
    show: Callable[[RolloutView], None] = lambda rollout: None,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> RolloutView:
    """Look at a rollout until it is done, halted or aborted, and return its last state; `show` sees every look.

    Raises:
        DeadlineExceeded: it was still open; the rollout itself goes on.
    """
    end = clock() + deadline_s
    while True:
        rollout = client.rollout(number)
        show(rollout)
        if rollout.state not in OPEN:
            return rollout
        if clock() >= end:
            raise DeadlineExceeded(
                f"after {deadline_s:g} s {_standing(rollout)}; the rollout {number} goes on (skerry rollouts show {number})"
            )
        sleep(LOOK_EVERY_S)


def judge(rollout: RolloutView) -> None:
    """Return when a finished rollout reached what it set out for; devices that no variant fits are no failure.

    Raises:
        Refused: it was halted, with the reason.
        NotReached: it was aborted, or some devices failed.
    """
    if rollout.state == "halted":
        raise Refused(f"the rollout {rollout.id} halted: {rollout.reason}; every device goes on with what it had")
    failed = [member for member in rollout.devices if member.stage == "failed"]
    if rollout.state == "aborted":
        raise NotReached(f"the rollout {rollout.id} was aborted; {_standing(rollout)}")
    if failed:
        raise NotReached(
            f"{len(failed)} of {len(rollout.devices)} devices failed, the first is {failed[0].device}: {failed[0].reason}"
        )


def _standing(rollout: RolloutView) -> str:
    serving = sum(member.stage == "serving" for member in rollout.devices)
    waited = [member for member in rollout.devices if member.stage in ("waiting", "assigned")]
    text = f"{serving} of {len(rollout.devices)} devices serve"
    if waited:
        first = waited[0]
        text += f", {first.device} is {'on the way' if first.online else 'offline'}"
    return text
