"""How models are timed side by side: in turns, ten answers in a row."""

import itertools
from typing import Any

import numpy as np
import pytest

from compress.measure import BURST, race
from skills import ort
from skills.ort import Port


class Clock:
    """Time that passes only where a model computes."""

    def __init__(self) -> None:
        self.now, self.said = 0.0, list[str]()

    def runner(self, name: str, seconds: float, cold: float = 0.0) -> Any:
        clock = self

        class Runner:
            inputs, outputs, load_ms = (Port("x", "float32", (1, 1)),), (Port("y", "float32", (1, 1)),), 0.0

            def run(self, _feeds: Any, _names: Any = None) -> Any:
                clock.now += seconds + (cold if not clock.said or clock.said[-1] != name else 0.0)
                clock.said.append(name)

        return Runner()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found, interleaved = Clock(), ort.interleaved
    monkeypatch.setattr(
        "compress.measure.ort.interleaved", lambda *args, **facts: interleaved(*args, clock=lambda: found.now, **facts)
    )
    return found


X = np.zeros((1, 1), np.float32)


def test_a_model_answers_ten_times_in_a_row_and_is_timed_warm(clock: Clock) -> None:
    runners = {name: clock.runner(name, 1e-3, cold=5e-3) for name in "abc"}
    times = race(runners, X, 3)
    turns = [len(list(turn)) for _, turn in itertools.groupby(clock.said[9:])]
    assert set(turns) <= {BURST, 2 * BURST}
    for timing in times.values():
        assert timing.runs == 3 * BURST
        assert timing.p50_ms == pytest.approx(1.0)


@pytest.mark.parametrize(("allowed", "rounds"), [(5, 5), (100, 8), (0, 4)])
def test_a_race_of_slow_models_has_the_rounds_that_its_time_allows(clock: Clock, allowed: int, rounds: int) -> None:
    times = race({"slow": clock.runner("slow", 1 / 128)}, X, 8, least=4, seconds=allowed * BURST / 128)
    assert times["slow"].runs == rounds * BURST
