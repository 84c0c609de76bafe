"""What the link believes of the network, and when it leaves the tail alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.estimator import CALL_MS, LAST_PROBE_S, Breaker, Estimator


def send(estimator: Estimator, now: float, mbit: float, rtt: float, size: int = 20_000, server_ms: float = 9.0) -> None:
    estimator.on_ping(now, rtt + CALL_MS)
    estimator.on_transfer(now, size, size * 8 / mbit / 1000 + rtt + server_ms + 2 * CALL_MS, server_ms)


@given(mbit=st.floats(0.5, 500), rtt=st.floats(0, 200))
def test_one_transfer_is_enough_to_know_the_rate(mbit: float, rtt: float) -> None:
    estimator = Estimator()
    assert estimator.now(0.0, up=True).mbit == 0
    send(estimator, 0.0, mbit, rtt)
    found = estimator.now(0.1, up=True)
    assert found.mbit == pytest.approx(mbit, rel=0.02)
    assert found.rtt_ms == pytest.approx(rtt, abs=0.1)


@pytest.mark.parametrize(("before", "after"), [(100, 5), (5, 1), (5, 100)])
def test_two_transfers_in_a_row_that_what_is_known_does_not_explain_are_another_link(before: int, after: int) -> None:
    estimator = Estimator()
    for at in range(5):
        send(estimator, at / 10, before, 5)
    send(estimator, 1.0, after, 5)
    assert before / 3 < estimator.now(1.0, up=True).mbit < before * 3  # one alone may be chance
    send(estimator, 1.1, after, 5)
    assert estimator.now(1.1, up=True).mbit == pytest.approx(after, rel=0.05)


def test_of_two_strange_transfers_the_one_that_says_less_is_believed_and_opposite_ones_are_chance() -> None:
    estimator = Estimator()
    for at, mbit in enumerate((20, 5, 2)):
        send(estimator, at / 10, mbit, 5)
    assert estimator.now(0.3, up=True).mbit == pytest.approx(5, rel=0.05)
    for at, mbit in enumerate((20, 1, 20, 1)):
        send(estimator, 1 + at / 10, mbit, 5)
    assert 1.5 < estimator.now(1.4, up=True).mbit < 15


def test_the_round_trip_is_the_least_of_the_last_ten_seconds() -> None:
    estimator = Estimator()
    for at, rtt in ((0.0, 5.0), (6.0, 50.0), (7.0, 60.0)):
        estimator.on_ping(at, rtt + CALL_MS)
    assert estimator.rtt_ms(8.0) == pytest.approx(5.0)
    assert estimator.rtt_ms(11.0) == pytest.approx(50.0)


def test_three_longer_round_trips_in_a_row_on_a_free_link_are_a_longer_way_and_ask_for_its_bandwidth() -> None:
    estimator = Estimator()
    send(estimator, 0.0, 20, 5)
    for at in (1.0, 1.2, 1.4):
        assert estimator.rtt_ms(at) == pytest.approx(5.0)
        assert not estimator.wants_probe(at)
        estimator.on_ping(at, 50.0 + CALL_MS)
    assert estimator.rtt_ms(1.4) == pytest.approx(50.0)
    assert estimator.wants_probe(1.4)


def test_round_trips_behind_a_request_or_between_short_ones_are_no_longer_way() -> None:
    estimator = Estimator()
    for at in range(20):
        estimator.on_ping(at / 10, (50.0 if at % 3 else 5.0) + CALL_MS)
    for at in range(20, 40):
        estimator.on_ping(at / 10, 50.0 + CALL_MS, alone=False)
    assert estimator.rtt_ms(4.0) == pytest.approx(5.0)


def test_a_tail_that_was_away_and_is_back_is_asked_for_its_bandwidth() -> None:
    estimator = Estimator()
    send(estimator, 0.0, 20, 5)
    assert not estimator.wants_probe(1.0)
    estimator.on_return()
    assert estimator.wants_probe(1.0)


@given(before=st.floats(0.5, 500), after=st.floats(0.5, 500))
def test_after_an_absence_one_transfer_is_enough_to_know_the_new_rate(before: float, after: float) -> None:
    estimator = Estimator()
    for at in range(20):
        send(estimator, at / 10, before, 5)
    estimator.on_return()
    estimator.on_transfer(30.0, 500, 40.0, 1.0)  # too small to say anything
    assert estimator.now(30.0, up=True).mbit == pytest.approx(before, rel=0.02)
    send(estimator, 30.1, after, 5)
    assert estimator.now(30.2, up=True).mbit == pytest.approx(after, rel=0.02)


def test_after_the_way_has_become_longer_one_transfer_is_enough_to_know_its_rate() -> None:
    estimator = Estimator()
    send(estimator, 0.0, 1, 5)
    for at in (1.0, 1.2, 1.4):
        estimator.on_ping(at, 50.0 + CALL_MS)
    send(estimator, 1.5, 20, 50)
    assert estimator.now(1.6, up=True).mbit == pytest.approx(20, rel=0.02)


@given(guess=st.floats(0, 200), server=st.floats(0, 200), mbit=st.floats(0.5, 500))
def test_a_tail_that_does_not_say_how_long_it_took_never_makes_the_rate_more_than_twice_as_high(
    guess: float, server: float, mbit: float
) -> None:
    estimator = Estimator()
    estimator.on_ping(0.0, 5 + CALL_MS)
    took = 20_000 * 8 / mbit / 1000 + 5 + server + 2 * CALL_MS
    estimator.on_transfer(0.1, 20_000, took, guess, guessed=True)
    assert estimator.now(0.2, up=True).mbit <= 2.01 * mbit


def test_what_a_plan_guessed_of_a_tail_is_taken_off_where_it_is_the_smaller_part() -> None:
    estimator = Estimator()
    estimator.on_ping(0.0, 5 + CALL_MS)
    estimator.on_transfer(0.1, 20_000, 80 + 5 + 9 + 2 * CALL_MS, 9.0, guessed=True)
    assert estimator.now(0.2, up=True).mbit == pytest.approx(2, rel=0.02)
    estimator.on_transfer(0.3, 20_000, 8 + 5 + 9 + 2 * CALL_MS, 90.0, guessed=True)
    assert estimator.now(0.4, up=True).mbit == pytest.approx(2, rel=0.02)


@given(sizes=st.lists(st.integers(1000, 3000), min_size=3, max_size=10), late=st.floats(0, 0.8))
def test_requests_of_a_few_kb_learn_within_two_that_a_slow_link_is_fast_now(sizes: list[int], late: float) -> None:
    estimator = Estimator()
    send(estimator, 0.0, 1, 30)
    for at, size in enumerate(sizes):
        send(estimator, 1 + at / 10, 1, 30, size)
    assert estimator.now(2.0, up=True).mbit == pytest.approx(1, rel=0.02)
    for at, size in enumerate(sizes):
        wire_ms = size * 8 / 20 / 1000
        estimator.on_transfer(3 + at / 10, size, wire_ms + late + 30 + 9 + 2 * CALL_MS, 9.0)
        found = estimator.now(3 + at / 10, up=True)
        if at >= 1:  # what is still believed of such a request's time is off by a few milliseconds at most
            assert size * 8 / found.mbit / 1000 - wire_ms < 5.0
            assert found.mbit < 30
    assert found.rtt_ms == pytest.approx(30)
    assert estimator.wants_probe(14.0)  # which tells more than small requests can


@given(
    sizes=st.lists(st.integers(1000, 3000), min_size=8, max_size=12),
    more=st.floats(0, 20), mbit=st.sampled_from([1.0, 5.0, 20.0]),
)  # fmt: skip
def test_small_requests_back_to_back_learn_that_the_way_is_longer_and_book_it_on_no_bandwidth(
    sizes: list[int], more: float, mbit: float
) -> None:
    estimator, now = Estimator(), 0.0
    send(estimator, now, mbit, 5)
    for rtt in (5, 50):
        for at, size in enumerate(sizes):
            took = size * 8 / mbit / 1000 + rtt + 9 + 2 * CALL_MS + more  # which is this machine's own
            now += took / 1000
            estimator.on_ping(now, rtt + CALL_MS, alone=False)
            estimator.on_transfer(now, size, took, 9.0)
            found = estimator.now(now, up=True)
            assert found.mbit == pytest.approx(mbit, rel=0.02)
            if rtt == 5 or at >= 2:
                assert found.rtt_ms == pytest.approx(rtt, abs=1.0)
    assert estimator.wants_probe(now)


def test_small_requests_on_a_way_that_became_shorter_are_no_faster_link() -> None:
    estimator = Estimator()
    send(estimator, 0.0, 1, 50)
    for at in range(20):
        estimator.on_transfer(0.1 + at / 50, 2000, 16 + 5 + 9 + 2 * CALL_MS, 9.0)
    assert estimator.now(1.0, up=True).mbit == pytest.approx(1, rel=0.02)


def test_a_ping_as_short_as_ever_says_that_requests_are_slow_for_another_reason() -> None:
    estimator = Estimator()
    send(estimator, 0.0, 20, 5)
    for at in range(30):
        estimator.on_transfer(0.1 + at / 20, 2000, 0.8 + 5 + 9 + 2 * CALL_MS + (20 if at else 0), 9.0)
        if at % 2:
            estimator.on_ping(0.1 + at / 20, 5 + CALL_MS, alone=False)
    assert estimator.now(2.0, up=True).rtt_ms == pytest.approx(5)
    assert not estimator.wants_probe(2.0)


def test_small_requests_that_take_too_long_again_and_again_cost_no_more_probes_than_their_share() -> None:
    estimator = Estimator()
    send(estimator, 0.0, 1, 5)
    for round_ in range(5):
        now = 1.0 + 20 * round_
        estimator.on_ping(now, 5 + CALL_MS)
        for at, late in enumerate((0, 60, 60, 60)):
            estimator.on_transfer(now + at / 20, 2000, 16 + 5 + late + 9 + 2 * CALL_MS, 9.0)
        if round_:
            assert not estimator.wants_probe(now + 1)
        assert estimator.wants_probe(now + 18)
        send(estimator, now + 18, 1, 5)
        estimator.on_probe(now + 18, took_s=0.3)  # 10 s are its share


def test_small_requests_beside_others_say_nothing_about_the_way() -> None:
    estimator = Estimator()
    send(estimator, 0.0, 20, 5)
    for at in range(30):
        estimator.on_transfer(0.1 + at / 20, 2000, 0.8 + (50 if at else 5) + 9 + 2 * CALL_MS, 9.0, alone=False)
    assert estimator.now(2.0, up=True).rtt_ms == pytest.approx(5)


def test_the_last_round_trip_known_is_that_of_the_link_alone() -> None:
    estimator = Estimator()
    estimator.on_ping(0.0, 5 + CALL_MS)
    assert estimator.rtt_ms(60.0) == pytest.approx(5)


def test_small_and_cold_transfers_say_nothing_about_the_rate() -> None:
    estimator = Estimator()
    estimator.on_transfer(0.0, 500, 40.0, 1.0)
    estimator.on_transfer(0.0, 50_000, 400.0, 1.0, cold=True)
    assert estimator.now(0.1, up=True).mbit == 0


def test_a_silent_link_is_cold() -> None:
    estimator = Estimator()
    estimator.on_traffic(0.0)
    assert not estimator.now(0.4, up=True).cold
    assert estimator.now(0.6, up=True).cold


def test_two_misses_open_the_breaker_and_one_answer_closes_it() -> None:
    breaker = Breaker()
    breaker.on_miss(0.0, 0.5)
    assert not breaker.open
    breaker.on_miss(0.1, 0.5)
    assert breaker.open
    assert breaker.probe_at_s == pytest.approx(0.6)
    breaker.on_success()
    assert not breaker.open
    assert breaker.misses == 0


@given(st.lists(st.floats(0, 1), min_size=3, max_size=30))
def test_probes_of_a_tail_that_lives_and_does_not_compute_grow_rarer_up_to_a_bound_and_are_spread(
    lucks: list[float],
) -> None:
    breaker, now = Breaker(), 0.0
    breaker.on_miss(now, 0.5)
    for at, luck in enumerate(lucks):
        breaker.on_miss(now, luck)  # on trial
        assert breaker.probe_at_s is not None
        wait, middle = breaker.probe_at_s - now, min(0.5 * 2**at, LAST_PROBE_S)
        assert 0.8 * middle - 1e-9 <= wait <= 1.2 * middle + 1e-9
        now = breaker.probe_at_s
        breaker.on_ping(now)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=30))
def test_requests_and_pings_that_were_on_their_way_when_it_opened_move_no_probe(late: list[tuple[float, bool]]) -> None:
    breaker = Breaker()
    breaker.on_miss(0.0, 0.5)
    breaker.on_miss(0.001, 0.5)
    for after, ping in late:
        breaker.on_miss(0.001 + after * 0.499, 0.5, ping=ping)
        assert breaker.probe_at_s == pytest.approx(0.501)
    waits = []
    for _ in range(5):
        assert breaker.probe_at_s is not None
        now = breaker.probe_at_s
        breaker.on_miss(now, 0.5, ping=True)
        waits.append(breaker.probe_at_s - now)
    assert waits == pytest.approx([1, 1, 1, 1, 1])


@given(st.lists(st.floats(0, 1), min_size=3, max_size=60))
def test_a_tail_that_is_away_is_looked_for_within_a_second_or_a_tenth_of_its_absence(lucks: list[float]) -> None:
    breaker, now = Breaker(), 0.0
    breaker.on_miss(now, 0.5, ping=True)
    for luck in lucks:
        breaker.on_miss(now, luck, ping=True)
        assert breaker.probe_at_s is not None
        wait = breaker.probe_at_s - now
        assert wait <= 1.2 * min(LAST_PROBE_S, max(1.0, 0.1 * now)) + 1e-9
        now = breaker.probe_at_s


def test_pings_do_not_hide_a_tail_that_lives_but_does_not_compute() -> None:
    breaker = Breaker()
    for at in range(2):
        breaker.on_miss(at, 0.5)
        if at == 0:
            breaker.on_ping(at + 0.5)
    assert breaker.open
    waits, now = [], 1.0
    for _ in range(4):
        assert breaker.probe_at_s is not None
        waits.append(breaker.probe_at_s - now)
        now = breaker.probe_at_s
        breaker.on_ping(now)  # lives: closed on trial
        assert not breaker.open
        breaker.on_miss(now, 0.5)  # and still does not compute: one request shows it
        assert breaker.open
    assert waits == pytest.approx([0.5, 1.0, 2.0, 4.0])
    breaker.on_ping(now)
    breaker.on_success()
    breaker.on_miss(now, 0.5)
    assert not breaker.open  # an answered request ends the trial


def test_a_trial_that_nobody_put_to_the_test_is_over_after_a_while() -> None:
    breaker = Breaker()
    breaker.on_miss(0.0, 0.5)
    breaker.on_miss(0.1, 0.5)
    breaker.on_ping(0.6)
    breaker.on_miss(60.0, 0.5)
    assert not breaker.open
    breaker.on_miss(60.1, 0.5)
    assert breaker.probe_at_s == pytest.approx(60.6)


def test_two_silent_pings_open_the_breaker_and_one_ping_closes_it_for_good() -> None:
    breaker = Breaker()
    breaker.on_miss(0.0, 0.5, ping=True)
    breaker.on_miss(0.1, 0.5, ping=True)
    assert breaker.open
    breaker.on_ping(0.6)
    breaker.on_miss(0.7, 0.5)
    assert not breaker.open


@given(st.lists(st.tuples(st.sampled_from(["answer", "ping", "miss", "silence"]), st.floats(0, 40)), max_size=60))
def test_an_open_breaker_always_probes_within_a_bound_and_any_answer_lets_requests_through(
    events: list[tuple[str, float]],
) -> None:
    breaker, now, decided = Breaker(), 0.0, 0.0
    for kind, wait in events:
        now, before = now + wait, breaker.probe_at_s
        if kind == "answer":
            breaker.on_success()
        elif kind == "ping":
            breaker.on_ping(now)
        else:
            breaker.on_miss(now, 1.0, ping=kind == "silence")
        assert not (breaker.open and kind in ("answer", "ping"))
        if breaker.probe_at_s != before:
            decided = now
            assert breaker.probe_at_s is None or breaker.probe_at_s > now
        assert breaker.probe_at_s is None or breaker.probe_at_s <= decided + 1.2 * LAST_PROBE_S + 1e-6


def test_a_probe_is_wanted_only_after_silence_and_takes_three_hundredths_of_the_time_at_most() -> None:
    estimator = Estimator()
    assert estimator.wants_probe(0.0)
    send(estimator, 0.0, 20, 5)
    assert not estimator.wants_probe(9.0)
    assert estimator.wants_probe(11.0)
    estimator.on_probe(11.0, took_s=0.5)
    assert not estimator.wants_probe(27.0)
    assert estimator.wants_probe(28.0)
