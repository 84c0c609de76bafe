"""Signals at a bad moment wait for a good one."""

import signal

import pytest

from cloud.interrupts import held_back


def test_a_signal_in_the_block_arrives_at_its_end_and_the_handlers_are_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    steps = []

    def work() -> None:
        with held_back():
            signal.raise_signal(signal.SIGINT)
            steps.append("remembered")
        steps.append("never reached")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert steps == ["remembered"]
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_in_the_block_stays_what_it_is() -> None:
    with pytest.raises(ValueError, match="mine"), held_back():
        raise ValueError("mine")
