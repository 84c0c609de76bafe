"""One rung of the ladder on small nets of every kind that learns: smaller, valid, placed on its runtime as planned."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest

from compress import channels, ladder, profiles
from compress.candidates import PLACING
from compress.data import Data
from compress.emit import emit
from compress.judge import check_audit
from compress.learn import Lesson, Reached, climb
from compress.measure import answers
from compress.metrics import choose
from compress.passes.canonicalise import canonicalise
from compress.pipeline import Bench, State, apply
from compress.splits import Splits, split
from skills import ort

KINDS = ["plain", "residual", "depthwise", "silu", "hardswish", "squeeze", "transposed", "conv1d", "transformer"]
STEPS = 8


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "steps", lambda *_: STEPS)


def cut(net: Any) -> Splits:
    return split(Data(net.x[:100], net.y[:100], net.x[100:600], net.y[100:600]), 0)


def lesson(model: Any, splits: Splits, store: dict[str, bytes] | None = None, **changes: Any) -> Lesson:
    session = ort.session(model.SerializeToString())
    store = {} if store is None else store
    assert splits.train is not None
    given: dict[str, Any] = {
        "calibrate": splits.calibrate, "train": splits.train, "original": session, "teacher": session,
        "labels": splits.train.y, "goal": "both", "widths": (8, 4, 3, 2), "seed": 0, "threads": 1,
        "left": lambda: math.inf, "get": store.get, "put": store.__setitem__, "say": lambda _stage, _share: None,
    }  # fmt: skip
    return Lesson(**(given | changes))


def climbed(net: Any, count: int = 1, store: dict[str, bytes] | None = None, **changes: Any) -> list[Reached]:
    model = canonicalise(net.model)
    steps = climb(model, lesson(model, cut(net), store, **changes))
    return list(itertools.islice(steps, count))


@pytest.mark.parametrize("kind", KINDS)
def test_a_rung_is_smaller_and_runs_as_it_was_placed(kind: str, small_net: Callable[[str], Any]) -> None:
    net = small_net(kind)
    model, splits = canonicalise(net.model), cut(net)
    (reached,) = climbed(net)
    small = reached.trained.model
    assert sum(channels.params(small).values()) < sum(channels.params(model).values())
    session = ort.session(model.SerializeToString())
    original = answers(session, splits.calibrate.x)
    metric = choose(Data(net.x, net.y), original, splits.calibrate.x)
    bench = Bench(
        profiles.find("x86-avx2"),
        splits,
        metric,
        original,
        answers(session, splits.select.x),
        1.0,
        "both",
        lambda *_: None,
    )
    state = apply(PLACING, State(small), lambda _step: bench)
    scheme = state.planned().with_bits(reached.bits).with_codes(reached.trained.codes)
    file = emit(small, scheme, state.seen()).SerializeToString()
    check_audit(ort.audit(file), scheme)
    assert answers(ort.session(file), splits.select.x).shape == (len(splits.select), 4)


def test_each_rung_goes_on_from_the_one_before_and_weighs_less(small_net: Callable[[str], Any]) -> None:
    one, two = climbed(small_net("residual"), 2)
    assert two.stages[0] == one.stages[0]
    assert len(two.stages) == 2
    sizes = [sum(channels.params(reached.trained.model).values()) for reached in (one, two)]
    assert sizes[1] < sizes[0]


def test_no_more_is_trained_where_that_is_the_word(small_net: Callable[[str], Any]) -> None:
    assert len(climbed(small_net("plain"), 3, onward=lambda: False)) == 1


def test_the_stages_planned_are_done_again_to_the_same_bytes(small_net: Callable[[str], Any]) -> None:
    net = small_net("plain")
    *_, last = climbed(net, 2)
    model = canonicalise(net.model)
    again = list(climb(model, lesson(model, cut(net), left=lambda: 0.0), last.stages))
    assert len(again) == 2
    assert again[-1].trained.model.SerializeToString() == last.trained.model.SerializeToString()
    for node, codes in last.trained.codes.items():
        assert again[-1].trained.codes[node].values.tobytes() == codes.values.tobytes()


def test_an_interrupted_climb_takes_up_its_plan_and_its_checkpoint(
    small_net: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.train.KEPT_EVERY_S", -1.0)
    net, store = small_net("plain"), dict[str, bytes]()
    said: list[str] = []

    def interrupt(stage: str, _share: float) -> None:
        said.append(stage)
        if said.count("training") == STEPS // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        climbed(net, store=store, say=interrupt)
    said.clear()
    (resumed,) = climbed(net, store=store, say=lambda stage, _share: said.append(stage))
    (whole,) = climbed(net)
    assert 0 < said.count("training") <= STEPS // 2 + 1
    assert "weighing the layers" not in said
    assert resumed.trained.model.SerializeToString() == whole.trained.model.SerializeToString()
    assert resumed.harm == whole.harm
    assert set(whole.bits) <= set(whole.harm)


def test_nothing_is_weighed_once_the_time_has_ended(
    small_net: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.learn.choose", lambda *_, **__: pytest.fail("the time has ended"))
    assert climbed(small_net("plain"), left=lambda: 0.0) == []


def test_no_more_is_weighed_where_the_time_ends_meanwhile(
    small_net: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    time = iter((1.0, 0.0))
    monkeypatch.setattr("compress.learn.choose", lambda _full, done, *_, **__: done)
    monkeypatch.setattr("compress.learn._settings", lambda *_: pytest.fail("the time has ended"))
    assert climbed(small_net("plain"), left=lambda: next(time)) == []


def test_no_time_means_no_rung(small_net: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "steps", lambda *_: 0)
    assert climbed(small_net("plain")) == []
