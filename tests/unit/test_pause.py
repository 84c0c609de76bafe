"""A device's work is timed after a pause, and the pause is no part of it."""

import itertools
from collections.abc import Mapping
from typing import Any

import pytest

from cloud.split import profile
from skills import ort
from skills.timer import PAUSE_S, Local

AFTERS, ROUNDS = (0, 1, 2), 4


class Told:
    """A chain, a whole model and a clock that tell in which order they were used."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.now = 0.0

    def run(self, values: Mapping[str, Any], start: int = 0, stop: int | None = None) -> Mapping[str, Any]:
        self.events.append("tail" if stop is None else "head")
        self.now += 0.001
        return values

    def sleep(self, seconds: float) -> None:
        assert seconds == PAUSE_S
        self.events.append("pause")
        self.now += seconds


def test_planning_rests_before_every_head_and_tail_that_counts_and_before_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Told()
    monkeypatch.setattr("cloud.split.profile.time.sleep", told.sleep)
    monkeypatch.setattr("cloud.split.profile.time.perf_counter", lambda: told.now)
    monkeypatch.setattr("cloud.split.profile.time.thread_time", lambda: told.now)
    costs, whole = profile.measure(told, told, AFTERS, [{}], Local(), ROUNDS)
    assert told.events.count("pause") == 2 * len(AFTERS) * ROUNDS
    assert {after for one, after in itertools.pairwise(told.events) if one == "pause"} == {"head", "tail"}
    assert whole.p50 == pytest.approx(1.0)
    assert all(one.device.p90 == pytest.approx(1.0) and one.tail.p90 == pytest.approx(1.0) for one in costs.values())


def test_a_pause_lies_before_each_counted_burst_and_outside_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    monkeypatch.setattr("skills.ort.time.sleep", told.sleep)
    found = ort.interleaved(
        {"a": lambda: told.run({})}, rounds=3, warmup=2, clock=lambda: told.now, burst=2, pause_s=PAUSE_S
    )
    assert told.events == ["tail"] * 4 + ["pause", "tail", "tail"] * 3
    assert found["a"].p90_ms == pytest.approx(1.0)
