"""Milliseconds of this machine and of a slower one."""

import time

import pytest

from skills.errors import UsageError
from skills.timer import Dilated, Local, parse_timer


def busy(seconds: float) -> str:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return "done"


def test_a_dilated_run_takes_its_cpu_time_so_many_times() -> None:
    timed = Dilated(5).run(lambda: busy(0.004))
    assert timed.value == "done"
    assert timed.ms >= 20


def test_the_factor_is_applied_to_cpu_time_and_not_to_waiting() -> None:
    assert Dilated(10).device_ms(wall_ms=100, cpu_ms=2) == 118
    assert Local().device_ms(wall_ms=100, cpu_ms=2) == 100


@pytest.mark.parametrize(
    ("text", "timer"), [("local", Local()), ("dilated(10)", Dilated(10)), ("dilated(2.5)", Dilated(2.5))]
)
def test_a_timer_is_read_as_agent_yaml_writes_it(text: str, timer: object) -> None:
    assert parse_timer(text) == timer


@pytest.mark.parametrize("text", ["", "dilated", "dilated(0)", "dilated(0.5)", "dilated(2000)", "fast"])
def test_another_timer_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match="write local or dilated"):
        parse_timer(text)
