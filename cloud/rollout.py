"""How a release reaches its devices: a canary group first, the rest when every canary serves. Pure.

    waiting ──► assigned ──► serving
                   │  └────► refused   no variant fits this device: it never blocks the others
                   └───────► failed    probe or trust: a canary's failure halts the rollout; the device is given back

`observe` takes in what devices report, `advance` decides what follows. The caller stores the result and the orders in one
transaction; after a crash the next look at the same reports finds the same orders.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from skills.errors import UsageError
from skills.report import Phase

Stage = Literal["waiting", "assigned", "serving", "refused", "failed", "superseded"]
State = Literal["running", "paused", "halted", "aborted", "done"]
SETTLED: frozenset[Stage] = frozenset(("serving", "refused", "failed", "superseded"))
OPEN_STATES: tuple[State, ...] = ("running", "paused")


@dataclasses.dataclass(frozen=True, slots=True)
class Member:
    """One device in a rollout: the version it shall get, and the one it goes back to when that fails (None: nothing)."""

    device: str
    version: str
    previous: str | None = None
    canary: bool = False
    stage: Stage = "waiting"
    reason: str = ""
    returned: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Rollout:
    """`canary` is the number of devices that must serve before the rest is assigned; 0 means no canary."""

    members: tuple[Member, ...]
    canary: int = 0
    state: State = "running"
    proven: bool = False
    reason: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """What a device last said about the version it shall get; `fits`: some variant fits its capabilities."""

    phase: Phase
    reason: str = ""
    fits: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Order:
    """From now on this device should run this version of the skill (None: the skill no longer)."""

    device: str
    version: str | None


def canary_size(text: str | None, devices: int) -> int:
    """Return how many canaries `"2"` or `"10%"` (rounded up, at least one) of `devices` are; None means no canary.

    Raises:
        UsageError: neither a count nor a percentage.
    """
    if text is None:
        return 0
    match = re.fullmatch(r"([0-9]{1,6})(%?)", text.strip())
    if match is None or int(match[1]) == 0 or (match[2] and int(match[1]) > 100):
        raise UsageError(f"the canary {text!r} is not understood: give a count like 1 or a share like 10%")
    count = math.ceil(devices * int(match[1]) / 100) if match[2] else int(match[1])
    return min(max(count, 1), devices)


def begin(members: Sequence[Member], canary: int) -> Rollout:
    """Start a rollout; canaries are taken in the order of `members`."""
    return Rollout(tuple(members), canary=canary, proven=canary == 0)


def observe(rollout: Rollout, facts: Mapping[str, Fact]) -> Rollout:
    """Take in what the devices report about the version that each of them shall get."""
    return dataclasses.replace(
        rollout, members=tuple(_observe(member, facts.get(member.device)) for member in rollout.members)
    )


def _observe(member: Member, fact: Fact | None) -> Member:
    if fact is None or member.stage in ("superseded", "refused", "failed"):
        return member
    if fact.phase == "serving":
        return member if member.stage == "serving" else dataclasses.replace(member, stage="serving", reason="")
    if member.stage == "waiting":
        return member  # what it says about this version is left from an earlier time
    if fact.phase == "refused" and not fact.fits:
        return dataclasses.replace(member, stage="refused", reason=fact.reason)
    if fact.phase in ("refused", "failed"):
        return dataclasses.replace(member, stage="failed", reason=fact.reason)
    if member.stage == "assigned" and member.reason != fact.reason:
        return dataclasses.replace(member, reason=fact.reason)
    return member


def advance(rollout: Rollout) -> tuple[Rollout, tuple[Order, ...]]:
    """Decide the next step: whom to assign, whom to give back, and whether the rollout halts or is done."""
    if rollout.state == "running":
        rollout = _run(rollout)
    elif rollout.state == "aborted":
        rollout = dataclasses.replace(rollout, members=tuple(_withdraw(member) for member in rollout.members))
    return _orders(rollout)


def _run(rollout: Rollout) -> Rollout:
    broken = [member for member in rollout.members if member.canary and member.stage == "failed"]
    if broken and not rollout.proven:
        first = broken[0]
        return dataclasses.replace(
            rollout, state="halted", reason=f"the canary {first.device} failed: {first.reason or 'no reason given'}"
        )
    if not rollout.proven:
        rollout = _canaries(rollout)
    if rollout.proven:
        rollout = _assign(rollout, [m.device for m in rollout.members if m.stage == "waiting"], canary=False)
    if all(member.stage in SETTLED for member in rollout.members):
        return _settle(rollout)
    return rollout


def _canaries(rollout: Rollout) -> Rollout:
    """Keep `canary` devices trying; a refused one is replaced, for it proves nothing."""
    trying = [member for member in rollout.members if member.canary and member.stage in ("assigned", "serving")]
    waiting = [member.device for member in rollout.members if member.stage == "waiting"]
    more = waiting[: max(0, rollout.canary - len(trying))]
    if more:
        return _assign(rollout, more, canary=True)
    if all(member.stage == "serving" for member in trying):
        return dataclasses.replace(rollout, proven=True)
    return rollout


def _assign(rollout: Rollout, devices: Collection[str], *, canary: bool) -> Rollout:
    chosen = frozenset(devices)
    members = tuple(
        dataclasses.replace(member, stage="assigned", canary=canary) if member.device in chosen else member
        for member in rollout.members
    )
    return dataclasses.replace(rollout, members=members)


def _settle(rollout: Rollout) -> Rollout:
    failed = [member for member in rollout.members if member.stage == "failed"]
    if failed and not any(member.stage == "serving" for member in rollout.members):
        reason = (
            f"no device serves it, {len(failed)} failed; {failed[0].device}: {failed[0].reason or 'no reason given'}"
        )
        return dataclasses.replace(rollout, state="halted", reason=reason)
    return dataclasses.replace(rollout, state="done", proven=True)


def _withdraw(member: Member) -> Member:
    if member.stage == "assigned":
        return dataclasses.replace(member, stage="failed", reason="the rollout was aborted before this device served")
    return member


def _orders(rollout: Rollout) -> tuple[Rollout, tuple[Order, ...]]:
    orders = [Order(member.device, member.version) for member in rollout.members if member.stage == "assigned"]
    lost = [member for member in rollout.members if member.stage == "failed" and not member.returned]
    orders += [Order(member.device, member.previous) for member in lost]
    members = tuple(dataclasses.replace(m, returned=True) if m in lost else m for m in rollout.members)
    return dataclasses.replace(rollout, members=members), tuple(orders)


def pause(rollout: Rollout) -> Rollout:
    """Assign nothing new until `resume`."""
    return _change(rollout, "pause", ("running",), "paused")


def resume(rollout: Rollout) -> Rollout:
    """Go on after `pause`."""
    return _change(rollout, "resume", ("paused",), "running")


def abort(rollout: Rollout) -> Rollout:
    """Stop for good: what serves goes on serving, who was still on the way goes back."""
    return _change(rollout, "abort", ("running", "paused", "halted"), "aborted")


def _change(rollout: Rollout, verb: str, allowed: tuple[State, ...], state: State) -> Rollout:
    if rollout.state not in allowed:
        raise UsageError(
            f"this rollout is {rollout.state}: only one that is {' or '.join(allowed)} can be told to {verb}"
        )
    return dataclasses.replace(rollout, state=state, reason="")


def supersede(rollout: Rollout, devices: Collection[str]) -> Rollout:
    """Let go of devices that a newer rollout of the same skill has taken over."""
    members = tuple(
        dataclasses.replace(member, stage="superseded", reason="a newer rollout took this device over")
        if member.device in devices and member.stage in ("waiting", "assigned")
        else member
        for member in rollout.members
    )
    return dataclasses.replace(rollout, members=members)


def join(rollout: Rollout, newcomers: Iterable[Member]) -> Rollout:
    """Add devices that appeared later and match; a finished rollout runs again until they settle too."""
    known = {member.device for member in rollout.members}
    members = [member for member in newcomers if member.device not in known]
    if not members or rollout.state not in ("running", "paused", "done"):
        return rollout
    state: State = "running" if rollout.state == "done" else rollout.state
    return dataclasses.replace(rollout, members=(*rollout.members, *members), state=state)


def served_after(stack: Sequence[str], version: str) -> tuple[str, ...]:
    """Return the versions that a device served, oldest first, once it serves `version`; going back forgets the newer ones."""
    if version in stack:
        return tuple(stack[: list(stack).index(version) + 1])
    return (*stack, version)
