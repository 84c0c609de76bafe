"""Milliseconds of this machine and of a slower one."""

import threading
import time

import pytest

from skills.errors import UsageError
from skills.timer import Dilated, Halt, Halted, Local, parse_timer


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


def test_a_dilated_run_ends_as_soon_as_it_is_halted() -> None:
    halt, working = Halt(), threading.Event()

    def work() -> None:
        busy(0.1)  # a hundred seconds on a device a thousand times slower
        working.set()

    waker = threading.Thread(target=lambda: working.wait(30) and halt.set())
    waker.start()
    with pytest.raises(Halted):
        Dilated(1000).run(work, halt)
    waker.join()


def test_what_is_to_be_done_at_a_halt_is_done_whenever_it_was_said() -> None:
    halt, done = Halt(), []
    halt.then(lambda: done.append("before"))
    halt.check()
    halt.set()
    halt.then(lambda: done.append("after"))
    assert done == ["before", "after"]
    with pytest.raises(Halted):
        halt.check()
