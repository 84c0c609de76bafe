"""The rollout's decisions, against scripted fleets and against fleets that hypothesis makes up."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloud import rollout as rules
from cloud.rollout import Fact, Member, Order, Rollout
from skills.errors import UsageError
from skills.report import Phase

PHASES: tuple[Phase, ...] = ("fetching", "staging", "probing", "serving", "refused", "failed", "stalled")


def fleet(count: int, canary: int = 0, previous: str | None = "1.0.0") -> Rollout:
    return rules.begin([Member(f"d{number}", "2.0.0", previous) for number in range(count)], canary)


def step(rollout: Rollout, **facts: Fact) -> tuple[Rollout, tuple[Order, ...]]:
    return rules.advance(rules.observe(rollout, facts))


def assigned(rollout: Rollout) -> set[str]:
    return {member.device for member in rollout.members if member.stage == "assigned"}


SERVES = Fact("serving")


def test_without_a_canary_everybody_is_assigned_at_once() -> None:
    rollout, orders = step(fleet(3))
    assert orders == tuple(Order(f"d{number}", "2.0.0") for number in range(3))
    rollout, _ = step(rollout, d0=SERVES, d1=SERVES, d2=SERVES)
    assert rollout.state == "done"


def test_the_rest_waits_until_every_canary_serves() -> None:
    rollout, _ = step(fleet(4, canary=2))
    assert assigned(rollout) == {"d0", "d1"}
    rollout, _ = step(rollout, d0=SERVES, d1=Fact("probing"))
    assert assigned(rollout) == {"d1"}
    rollout, _ = step(rollout, d0=SERVES, d1=SERVES)
    assert assigned(rollout) == {"d2", "d3"}


def test_a_failed_canary_halts_with_its_reason_and_goes_back_to_what_it_ran() -> None:
    rollout, _ = step(fleet(3, canary=1))
    rollout, orders = step(rollout, d0=Fact("failed", "probe: 9 of 64 differ"))
    assert rollout.state == "halted"
    assert rollout.reason == "the canary d0 failed: probe: 9 of 64 differ"
    assert orders == (Order("d0", "1.0.0"),)
    rollout, orders = step(rollout, d0=Fact("failed", "probe: 9 of 64 differ"))
    assert orders == ()


def test_a_trust_refusal_in_a_canary_halts_but_a_device_that_nothing_fits_does_not() -> None:
    rollout, _ = step(fleet(3, canary=1))
    halted, _ = step(rollout, d0=Fact("refused", "another hash", fits=True))
    assert halted.state == "halted"
    goes_on, _ = step(rollout, d0=Fact("refused", "no runtime", fits=False))
    assert goes_on.state == "running"
    assert assigned(goes_on) == {"d1"}  # the next one takes the canary's place: a refusal proves nothing


def test_a_failure_after_the_canary_goes_back_and_stops_nobody() -> None:
    rollout, _ = step(fleet(3, canary=1))
    rollout, _ = step(rollout, d0=SERVES)
    rollout, orders = step(rollout, d0=SERVES, d1=Fact("failed", "it crashed"), d2=SERVES)
    assert Order("d1", "1.0.0") in orders
    assert rollout.state == "done"


def test_a_release_that_serves_nowhere_is_halted_not_done() -> None:
    rollout, _ = step(fleet(2))
    rollout, _ = step(rollout, d0=Fact("failed", "x"), d1=Fact("failed", "y"))
    assert rollout.state == "halted"
    assert rollout.reason == "no device serves it, 2 failed; d0: x"


def test_a_device_that_had_nothing_before_goes_back_to_nothing() -> None:
    rollout, _ = step(fleet(1, canary=1, previous=None))
    _, orders = step(rollout, d0=Fact("failed", "x"))
    assert orders == (Order("d0", None),)


def test_what_a_waiting_device_said_about_the_version_earlier_does_not_fail_it() -> None:
    rollout, _ = step(fleet(2, canary=1), d1=Fact("failed", "from an earlier rollout"))
    assert rollout.members[1].stage == "waiting"


def test_a_paused_rollout_assigns_nothing_until_it_is_resumed() -> None:
    rollout, _ = step(fleet(2, canary=1))
    rollout, _ = step(rules.pause(rollout), d0=SERVES)
    assert assigned(rollout) == set()
    rollout, _ = step(rules.resume(rollout), d0=SERVES)
    assert assigned(rollout) == {"d1"}


def test_an_aborted_rollout_leaves_what_serves_and_takes_back_the_rest() -> None:
    rollout, _ = step(fleet(3))
    rollout, _ = step(rollout, d0=SERVES)
    rollout, orders = step(rules.abort(rollout))
    assert orders == (Order("d1", "1.0.0"), Order("d2", "1.0.0"))
    assert rollout.members[0].stage == "serving"


@pytest.mark.parametrize("verb", [rules.pause, rules.resume])
def test_a_finished_rollout_cannot_be_paused_or_resumed(verb: object) -> None:
    rollout, _ = step(fleet(1), d0=SERVES)
    assert rollout.state == "done"
    with pytest.raises(UsageError, match="this rollout is done"):
        verb(rollout)  # type: ignore[operator]


def test_a_newer_rollout_takes_its_devices_and_the_older_one_settles_without_them() -> None:
    rollout, _ = step(fleet(2))
    rollout, orders = step(rules.supersede(rollout, {"d1"}), d0=SERVES)
    assert rollout.state == "done"
    assert all(order.device != "d1" for order in orders)


def test_a_late_device_joins_a_finished_rollout_and_only_it_is_assigned() -> None:
    rollout, _ = step(fleet(2, canary=1))
    rollout, _ = step(rollout, d0=SERVES)
    rollout, _ = step(rollout, d0=SERVES, d1=SERVES)
    rollout = rules.join(rollout, [Member("late", "2.0.0"), Member("d0", "2.0.0")])
    rollout, orders = step(rollout)
    assert orders == (Order("late", "2.0.0"),)
    rollout, _ = step(rollout, late=SERVES)
    assert rollout.state == "done"


@pytest.mark.parametrize("ended", ["halted", "aborted"])
def test_nobody_joins_a_rollout_that_was_halted_or_aborted(ended: rules.State) -> None:
    rollout = dataclasses.replace(fleet(1), state=ended)
    assert rules.join(rollout, [Member("late", "2.0.0")]) == rollout


@pytest.mark.parametrize(
    ("text", "devices", "size"), [(None, 5, 0), ("1", 5, 1), ("10%", 200, 20), ("10%", 5, 1), ("9", 5, 5)]
)
def test_a_canary_is_a_count_or_a_share_rounded_up(text: str | None, devices: int, size: int) -> None:
    assert rules.canary_size(text, devices) == size


@pytest.mark.parametrize("text", ["", "0", "0%", "101%", "-1", "1.5", "ten", "10 %%"])
def test_another_canary_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="give a count like 1 or a share like 10%"):
        rules.canary_size(text, 5)


def test_going_back_forgets_the_newer_versions() -> None:
    stack: tuple[str, ...] = ()
    for version in ("1", "2", "3", "2"):
        stack = rules.served_after(stack, version)
    assert stack == ("1", "2")
    assert rules.served_after(stack, "3") == ("1", "2", "3")


# --- any fleet at all ------------------------------------------------------------------------------

FACTS = st.builds(Fact, st.sampled_from(PHASES), st.just("because"), st.booleans())


@given(
    st.integers(1, 8), st.integers(0, 4), st.lists(st.dictionaries(st.integers(0, 7), FACTS), max_size=12), st.data()
)
def test_never_more_than_the_canary_tries_before_it_is_proven(
    count: int, canary: int, reports: list[dict[int, Fact]], data: st.DataObject
) -> None:
    canary = min(canary, count)
    rollout, _ = step(fleet(count, canary))
    for report in reports:
        verb = data.draw(st.sampled_from((None, None, None, rules.pause, rules.resume, rules.abort)))
        if verb is not None:
            try:
                rollout = verb(rollout)
            except UsageError:
                continue
        before = rollout
        rollout, orders = step(rollout, **{f"d{number}": fact for number, fact in report.items()})
        if canary and not rollout.proven:
            assert (
                sum(
                    member.stage == "assigned" or (member.canary and member.stage == "serving")
                    for member in rollout.members
                )
                <= canary
            )
        if before.state in ("halted", "aborted", "paused", "done"):
            fresh = assigned(rollout) - assigned(before)
            assert not fresh
        for order in orders:
            member = next(member for member in rollout.members if member.device == order.device)
            assert order.version == (member.version if member.stage == "assigned" else member.previous)


@given(
    st.integers(1, 8),
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from(("serving", "refused", "failed")), st.booleans()), min_size=8, max_size=8),
)
def test_it_always_settles_when_every_assigned_device_answers(
    count: int, canary: int, answers: list[tuple[Phase, bool]]
) -> None:
    rollout, _ = step(fleet(count, min(canary, count)))
    for _ in range(2 * count + 2):
        told = {f"d{number}": Fact(phase, "because", fits) for number, (phase, fits) in enumerate(answers[:count])}
        rollout, _ = step(rollout, **{device: fact for device, fact in told.items() if device in assigned(rollout)})
    assert rollout.state in ("done", "halted")
    assert not assigned(rollout) or rollout.state == "halted"
    if rollout.state == "done":
        assert all(member.stage in rules.SETTLED for member in rollout.members)


@given(st.integers(1, 6), st.integers(0, 3))
def test_devices_that_nothing_fits_never_block(count: int, canary: int) -> None:
    rollout, _ = step(fleet(count, min(canary, count)))
    for _ in range(count + 1):
        rollout, _ = step(
            rollout, **{f"d{number}": Fact("refused", "no runtime", fits=False) for number in range(count)}
        )
    assert rollout.state == "done"


@given(st.lists(st.dictionaries(st.integers(0, 4), FACTS), max_size=8))
def test_looking_twice_at_the_same_reports_orders_the_same(reports: list[dict[int, Fact]]) -> None:
    rollout, _ = step(fleet(5, 2))
    for report in reports:
        facts = {f"d{number}": fact for number, fact in report.items()}
        once, orders = step(rollout, **facts)
        again, repeated = step(rollout, **facts)  # a crash before the first was stored
        assert (once, orders) == (again, repeated)
        rollout = once
