"""The compute thread on scripted segments: batches, deadlines between segments, draining, faults."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cloud.tail.engine import Draining, Engine, QueueFull
from cloud.tail.joined import Joined
from cloud.tail.metrics import Metrics
from cloud.tail.pace import Batching, Pace
from cloud.tail.store import Loaded
from skills.errors import DeadlineExceeded, FormatError

WAIT_S = 20.0


class Chain:
    """Two segments that add one. `gate` holds the first run until the test opens it; `started` says that it began."""

    def __init__(self) -> None:
        self.gate, self.started = threading.Event(), threading.Event()
        self.batches: list[list[float]] = []
        self.on_run: Callable[[int, np.ndarray], None] = lambda at, array: None

    def run(self, values: Any, start: int, stop: int) -> Any:
        array = values["x"]
        self.started.set()
        assert self.gate.wait(WAIT_S)
        if start == 0:
            self.batches.append(array[:, 0].tolist())
        self.on_run(start, array)
        return {"x": array + 1}


class Planned:
    segments = (None, None)


@pytest.fixture
def chain() -> Chain:
    return Chain()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def engine(chain: Chain, metrics: Metrics) -> Iterator[Engine]:
    made = Engine(metrics, bound=8)
    yield made
    chain.gate.set()
    made.drain(0)


@pytest.fixture
def ask(chain: Chain, engine: Engine) -> Callable[..., Any]:
    """Submit a request whose one value is `number`; the first one submitted occupies the thread until the gate opens."""
    loaded = Loaded("0" * 16, Planned(), chain, Pace(2))  # type: ignore[arg-type]

    def submit(number: float, left_s: float = 60.0, wanted: Callable[[], bool] = lambda: True, batch: int = 4) -> Any:
        loaded.pace.batching = {0: Batching(batch, {1: 0.0, 2: 0.0, 4: 0.0}, "")}
        values = {"x": np.full((1, 1), number)}
        return engine.submit(loaded, 0, values, time.monotonic() + left_s, wanted)

    return submit


def busy(chain: Chain, ask: Callable[..., Any]) -> Any:
    first = ask(0)
    assert chain.started.wait(WAIT_S)
    return first


def test_what_is_joined_behind_a_cut_runs_at_once_and_its_pace_is_known(chain: Chain, engine: Engine) -> None:
    class Whole:
        def run(self, values: Any) -> Any:
            return {"x": values["x"] + 40}

    chain.gate.set()
    loaded = Loaded("0" * 16, Planned(), chain, Pace(2), {0: Joined(Whole(), 1)})  # type: ignore[arg-type]
    answers = [
        engine.submit(loaded, after, {"x": np.zeros((1, 1))}, time.monotonic() + WAIT_S, lambda: True)
        for after in (0, 1)
    ]
    assert [float(one.result(WAIT_S).outputs["x"][0, 0]) for one in answers] == [40, 1]
    assert 0 < loaded.pace.least_s(0) < WAIT_S


def test_what_waits_together_runs_together_and_each_gets_its_own_answer(chain: Chain, ask: Any) -> None:
    first = busy(chain, ask)
    others = [ask(number, left_s=60 + number) for number in (1, 2, 3, 4)]
    chain.gate.set()
    assert [one.result(WAIT_S).outputs["x"].tolist() for one in (first, *others)] == [[[n + 2.0]] for n in range(5)]
    assert chain.batches == [[0], [1, 2, 3, 4]]


def test_where_batches_do_not_pay_the_earliest_deadline_runs_first_and_alone(chain: Chain, ask: Any) -> None:
    busy(chain, ask)
    others = [ask(number, left_s=90 - number, batch=1) for number in (1, 2, 3)]
    chain.gate.set()
    for one in others:
        one.result(WAIT_S)
    assert chain.batches == [[0], [3], [2], [1]]


def test_a_request_that_expires_between_segments_leaves_its_batch_and_the_others_are_answered(
    chain: Chain, ask: Any, metrics: Metrics
) -> None:
    gone = threading.Event()
    busy(chain, ask)
    one, two, three = ask(1), ask(2, wanted=lambda: not gone.is_set()), ask(3)
    chain.on_run = lambda at, array: gone.set() if len(array) > 1 else None
    chain.gate.set()
    assert [job.result(WAIT_S).outputs["x"].tolist() for job in (one, three)] == [[[3.0]], [[5.0]]]
    with pytest.raises(DeadlineExceeded, match="the caller has gone"):
        two.result(WAIT_S)
    assert b'skerry_tail_expired_total{where="gone"} 1.0' in metrics.text()


class Turned(Chain):
    """Between its two segments time stands first and the requests second, as recurrent layers have it."""

    def run(self, values: Any, start: int, stop: int) -> Any:
        found = super().run({"x": values["x"].T if start else values["x"]}, start, stop)["x"]
        return {"x": found if start else found.T}


def test_whatever_lies_first_between_segments_nobody_gets_the_answer_of_another(engine: Engine) -> None:
    chain, gone = Turned(), threading.Event()
    loaded = Loaded("0" * 16, Planned(), chain, Pace(2))  # type: ignore[arg-type]
    loaded.pace.batching = {0: Batching(4, {1: 0.0, 2: 0.0, 4: 0.0}, "")}

    def submit(number: int, wanted: Callable[[], bool] = lambda: True) -> Any:
        values = {"x": np.arange(4.0)[None] + 10 * number}
        return engine.submit(loaded, 0, values, time.monotonic() + WAIT_S, wanted)

    submit(0)
    assert chain.started.wait(WAIT_S)
    jobs = [submit(1, lambda: not gone.is_set()), submit(2)]
    chain.on_run = lambda at, array: gone.set() if len(array) > 1 else None
    chain.gate.set()
    assert jobs[1].result(WAIT_S).outputs["x"].tolist() == [[22, 23, 24, 25]]
    with pytest.raises(DeadlineExceeded, match="the caller has gone"):
        jobs[0].result(WAIT_S)
    assert chain.batches == [[0], [10, 20]]


def test_requests_whose_answers_have_several_rows_each_are_answered_one_by_one(chain: Chain, ask: Any) -> None:
    def twice(values: Any, start: int, stop: int) -> Any:
        found = Chain.run(chain, values, start, stop)["x"]
        return {"x": np.repeat(found, 2, 0) if start else found}

    chain.run = twice  # type: ignore[method-assign]
    busy(chain, ask)
    jobs = [ask(number) for number in (1, 2)]
    chain.gate.set()
    assert [job.result(WAIT_S).outputs["x"].tolist() for job in jobs] == [[[3.0], [3.0]], [[4.0], [4.0]]]


def test_one_bad_request_in_a_batch_spoils_only_its_own_answer(chain: Chain, ask: Any) -> None:
    def picky(at: int, array: np.ndarray) -> None:
        if at == 0 and 2 in array:
            raise FormatError("no twos")

    busy(chain, ask)
    jobs = [ask(number) for number in (1, 2, 3)]
    chain.on_run = picky
    chain.gate.set()
    assert [job.result(WAIT_S).outputs["x"].tolist() for job in (jobs[0], jobs[2])] == [[[3.0]], [[5.0]]]
    with pytest.raises(FormatError, match="no twos"):
        jobs[1].result(WAIT_S)


def test_a_full_queue_refuses_at_once(chain: Chain, ask: Any) -> None:
    busy(chain, ask)
    for number in range(8):
        ask(number)
    with pytest.raises(QueueFull, match="has 8 requests waiting"):
        ask(9)


def test_draining_refuses_what_is_new_and_answers_what_waits(chain: Chain, ask: Any, engine: Engine) -> None:
    first = busy(chain, ask)
    waits = ask(1)
    draining = threading.Thread(target=engine.drain, args=(WAIT_S,))
    draining.start()
    until = time.monotonic() + WAIT_S
    while not engine.draining and time.monotonic() < until:
        draining.join(0.001)
    with pytest.raises(Draining, match="shutting down"):
        ask(2)
    chain.gate.set()
    assert first.result(WAIT_S).outputs["x"].tolist() == [[2.0]]
    assert waits.result(WAIT_S).outputs["x"].tolist() == [[3.0]]
    draining.join(WAIT_S)
    assert not draining.is_alive()


def test_what_draining_has_no_time_for_is_given_up_in_one_sentence(chain: Chain, ask: Any, engine: Engine) -> None:
    first = busy(chain, ask)
    waits = ask(1)
    draining = threading.Thread(target=engine.drain, args=(0.0,))
    draining.start()
    until = time.monotonic() + WAIT_S
    while not engine.draining and time.monotonic() < until:
        draining.join(0.001)
    chain.gate.set()
    for job in (first, waits):
        with pytest.raises(Draining, match="the tail shut down before"):
            job.result(WAIT_S)
    draining.join(WAIT_S)


def test_a_request_that_cannot_be_in_time_any_more_is_not_begun(chain: Chain, ask: Any, engine: Engine) -> None:
    chain.gate.set()
    loaded = Loaded("0" * 16, Planned(), chain, Pace(2))  # type: ignore[arg-type]
    loaded.pace.ran(1, 1000.0, 2)
    late = engine.submit(loaded, 0, {"x": np.zeros((1, 1))}, time.monotonic() + 60, lambda: True)
    with pytest.raises(DeadlineExceeded, match="ran out while it waited"):
        late.result(WAIT_S)
    assert chain.batches == []


def test_a_request_that_finds_nobody_else_runs_on_its_callers_thread_and_others_wait_for_it(
    chain: Chain, engine: Engine, ask: Any
) -> None:
    threads: list[str] = []
    chain.on_run = lambda _at, _array: threads.append(threading.current_thread().name)
    loaded = Loaded("1" * 16, Planned(), chain, Pace(2))  # type: ignore[arg-type]
    found: list[Any] = []

    def alone() -> None:
        values = {"x": np.zeros((1, 1))}
        found.append(engine.submit(loaded, 0, values, time.monotonic() + 60, lambda: True, here=True))

    caller = threading.Thread(target=alone, name="caller")
    caller.start()
    assert chain.started.wait(WAIT_S)
    waiting = ask(7)
    assert engine.waiting == 1  # nothing computes beside it
    chain.gate.set()
    caller.join(WAIT_S)
    assert found[0].result(WAIT_S).outputs["x"].item() == 2
    assert waiting.result(WAIT_S).outputs["x"].item() == 9
    assert threads == ["caller", "caller", "tail-compute", "tail-compute"]


def test_draining_waits_for_what_runs_on_a_callers_thread(chain: Chain, engine: Engine) -> None:
    loaded = Loaded("1" * 16, Planned(), chain, Pace(2))  # type: ignore[arg-type]
    found: list[Any] = []
    values = {"x": np.zeros((1, 1))}
    caller = threading.Thread(
        target=lambda: found.append(
            engine.submit(loaded, 0, values, time.monotonic() + 60, lambda: True, here=True).result(WAIT_S)
        )
    )
    caller.start()
    assert chain.started.wait(WAIT_S)
    ending = threading.Thread(target=engine.drain, args=(WAIT_S,))
    ending.start()
    chain.gate.set()
    ending.join(WAIT_S)
    caller.join(WAIT_S)
    assert not ending.is_alive()
    assert found[0].outputs["x"].item() == 2
