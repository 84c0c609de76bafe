"""A split model against a scripted tail: every request is answered, in time where staying local would be, and rightly."""

import dataclasses
import math
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloud.split.export import commented
from edge_agent.infer import SplitModel
from edge_agent.tail_client import Reply
from edge_agent.tail_fake import FakeClock, FakeTail
from edge_agent.worker import CallableModel
from skills import codec, ort, zstd
from skills.errors import FormatError
from skills.manifest import Variant
from skills.split import Estimate
from skills.split_plan import Millis, load_plan
from skills.timer import Local, Timed


class Ticking:
    """A timer on the fake clock: every run takes the same time."""

    def __init__(self, clock: FakeClock, seconds: float = 0.0002) -> None:
        self.clock, self.seconds = clock, seconds

    def run(self, work: Callable[[], Any], halt: Any = None) -> Timed[Any]:
        value = work()
        self.clock.advance(self.seconds)
        return Timed(value, self.seconds * 1e3)

    def device_ms(self, wall_ms: float, cpu_ms: float) -> float:
        return wall_ms


class Arriving(Ticking):
    """The reply comes while the first segment behind the cut runs here."""

    def run(self, work: Callable[[], Any], halt: Any = None) -> Timed[Any]:
        if halt is not None:
            self.clock.advance(1)
            halt.set()
        return super().run(work)


class Bench:
    """A split model, its fake tail, and the whole model to compare with."""

    def __init__(self, planned: Any, **options: Any) -> None:
        self.clock = FakeClock()
        self.tail = FakeTail(planned.folder, self.clock)
        self.model = SplitModel(planned.folder, timer=Ticking(self.clock), link=self.tail, clock=self.clock, **options)
        self.cut = next(cut.name for cut in self.model.plan.cuts if cut.name.startswith("c") and cut.codings)
        self.whole = ort.session(planned.model)
        self.x = planned.x

    def ask(self, at: int = 0, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        x = self.x[at : at + 1]
        return self.model.answer({"x": x}, **options)["logits"], self.whole.run({"x": x})["logits"]


@pytest.fixture
def bench(planned_net: Any) -> Bench:
    return Bench(planned_net)


def test_without_a_link_everything_runs_here(planned_net: Any) -> None:
    model = SplitModel(planned_net.folder)
    found = model(x=planned_net.x[:2])["logits"]
    np.testing.assert_allclose(found, ort.session(planned_net.model).run({"x": planned_net.x[:2]})["logits"], atol=1e-5)
    assert (model.last.where, model.last.cut, model.last.bytes, model.last.reason) == ("local", "local", 0, "no link")
    assert model.away is None


def test_an_answer_in_time_comes_from_the_tail_and_is_right_within_the_coding(bench: Bench) -> None:
    bench.model.use(bench.cut)
    found, right = bench.ask()
    assert (bench.model.last.where, bench.model.last.cut) == ("split", bench.cut)
    assert bench.model.last.bytes > 0
    assert found.argmax() == right.argmax()


def test_the_compressed_input_is_reported_as_cloud(bench: Bench) -> None:
    bench.model.use("input")
    bench.ask()
    assert bench.model.last.where == "cloud"


def test_a_silent_tail_costs_the_wait_and_the_answer_is_the_whole_models(bench: Bench) -> None:
    bench.model.use(bench.cut)
    bench.tail.silent = True
    start = bench.clock()
    found, right = bench.ask()
    assert bench.model.last.where == "continued"
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert bench.clock() - start < 0.25 + 0.1
    assert bench.tail.cancelled == [(1, True)]


def test_with_a_deadline_the_device_goes_on_as_soon_as_waiting_would_make_it_late(bench: Bench) -> None:
    bench.model.use(bench.cut)
    bench.tail.silent = True
    for deadline in (0.08, 0.15):
        start = bench.clock()
        bench.ask(deadline_s=deadline)
        assert bench.clock() - start <= deadline


def test_the_plans_slo_is_a_deadline_and_a_sooner_one_counts(planned_net: Any, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(planned_net.folder, folder)
    plan = load_plan((folder / "split.yaml").read_text())
    plan = dataclasses.replace(plan, policy=dataclasses.replace(plan.policy, slo_ms=150.0))
    (folder / "split.yaml").write_text(commented(plan))
    bench = Bench(dataclasses.replace(planned_net, folder=folder))
    bench.model.use(bench.cut)
    bench.tail.silent = True
    for asked, deadline in ((None, 0.15), (0.08, 0.08), (30.0, 0.15)):
        start = bench.clock()
        bench.ask(deadline_s=asked)
        assert bench.clock() - start <= deadline


def test_each_model_of_a_skill_waits_no_longer_than_its_asker_still_does(planned_net: Any) -> None:
    tail: Any = FakeTail(planned_net.folder, FakeClock())
    tail.silent = True
    variant = Variant("v", "onnxruntime", split="split.yaml")
    model = CallableModel(variant, planned_net.folder, Local(), tail, 0.25)
    assert model._split is not None
    model._split.use("input")
    for until_s, most_s in ((None, 0.25), (time.monotonic() + 0.1, 0.1), (time.monotonic() - 1, 0.0)):
        model.until_s = until_s
        assert model(x=planned_net.x[:1])["logits"].shape == (1, 4)
        assert model.ran[0] == "continued"
        asked_s = tail.waits[0]
        assert asked_s == 0.25 if until_s is None else asked_s <= most_s
        tail.waits.clear()


def test_a_reply_that_comes_while_the_device_goes_on_still_counts(bench: Bench) -> None:
    bench.model.use("input")
    bench.tail.delay_s = 0.0401
    bench.model._wait_s = 0.04
    bench.ask()
    assert bench.model.last.where == "cloud"
    assert bench.model.last.reason.startswith("late: no answer within 40 ms")


def test_a_reply_in_the_middle_of_a_segment_ends_it_and_counts(bench: Bench) -> None:
    bench.model.use("input", max(bench.model.plan.cut("input").codings, key=lambda one: one.bytes_p50))
    bench.tail.delay_s = 0.05
    bench.model._wait_s = 0.04
    bench.model.timer = Arriving(bench.clock)
    found, right = bench.ask()
    assert (bench.model.last.where, bench.model.last.bytes > 0) == ("cloud", True)
    assert bench.tail.cancelled == []
    np.testing.assert_allclose(found, right, atol=0.1)


def test_a_reply_that_ended_a_segment_and_is_no_answer_costs_that_segment_again_and_no_more(bench: Bench) -> None:
    bench.model.use(bench.cut)
    bench.tail.delay_s, bench.tail.refuse = 0.05, Reply({"other": np.zeros(1)})
    bench.model._wait_s = 0.04
    bench.model.timer = Arriving(bench.clock)
    found, right = bench.ask()
    assert bench.model.last.where == "continued"
    assert bench.tail.cancelled == []
    np.testing.assert_allclose(found, right, atol=1e-5)


def test_how_slow_the_device_is_now_is_learnt_from_the_whole_and_not_from_writing_a_frame(bench: Bench) -> None:
    local = bench.model.plan.cut("local").device_ms.p50
    bench.model._learn(0.1 * local, 0.05 * local)
    assert bench.model._alpha == 1.0
    bench.model._learn(1.5 * max(local, 2.0), max(local, 2.0))
    assert bench.model._alpha == pytest.approx(1.5)
    for _ in range(20):
        bench.model._learn(max(local, 2.0), max(local, 2.0))
    assert 1.0 < bench.model._alpha < 1.1


def test_a_device_that_needs_its_time_for_itself_goes_on_at_once(bench: Bench) -> None:
    plan = bench.model.plan
    slow = dataclasses.replace(plan.cut("local"), device_ms=Millis(90.0, 120.0))
    bench.model._planned = dataclasses.replace(
        plan, cuts=tuple(slow if one.name == "local" else one for one in plan.cuts)
    )
    bench.model.use("input")
    bench.tail.silent = True
    start = bench.clock()
    bench.ask(deadline_s=0.1)  # as a rule it makes it, one time out of ten it does not: no moment is to be lost
    assert bench.clock() - start < 0.01


def test_a_refused_plan_is_not_tried_again_for_a_minute(bench: Bench) -> None:
    bench.model.use(bench.cut)
    bench.tail.refuse = Reply(None, "invalid", "no plan 'x' lies here")
    found, right = bench.ask()
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert (bench.model.last.where, bench.model.last.reason) == ("continued", "no plan 'x' lies here")
    assert bench.model.away is None
    bench.tail.refuse = None
    bench.ask()
    assert (bench.model.last.where, bench.model.last.reason) == ("local", "the tail refuses this plan")
    bench.clock.advance(61)
    bench.ask()
    assert bench.model.last.where == "split"


@pytest.mark.parametrize("refusal", [Reply(None, "invalid", "no plan 'x' lies here"), Reply({"other": np.zeros(1)})])
def test_a_refusal_that_comes_while_the_device_goes_on_counts_as_well(bench: Bench, refusal: Reply) -> None:
    bench.model.use(bench.cut)
    bench.tail.delay_s, bench.tail.refuse = 0.0401, refusal
    bench.model._wait_s = 0.04
    found, right = bench.ask()
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert (bench.model.last.where, bench.tail.cancelled) == ("continued", [])
    bench.ask()
    assert (bench.model.last.where, bench.model.last.reason) == ("local", "the tail refuses this plan")


def test_a_plan_that_the_tail_is_loading_rests_for_a_moment(bench: Bench) -> None:
    bench.model.use(bench.cut)
    bench.tail.refuse = Reply(None, "loading", "the plan is being loaded")
    found, right = bench.ask()
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert (bench.model.last.where, bench.model.last.reason) == ("continued", "the plan is being loaded")
    bench.tail.refuse = None
    bench.ask()
    assert (bench.model.last.where, bench.model.last.reason) == ("local", "the tail is loading this plan")
    bench.clock.advance(1.1)
    bench.ask()
    assert bench.model.last.where == "split"


def test_an_answer_without_an_output_is_no_answer(bench: Bench) -> None:
    bench.model.use(bench.cut)
    bench.tail.refuse = Reply({"other": np.zeros(1)})
    found, right = bench.ask()
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert bench.model.last.where == "continued"
    assert bench.model.last.reason == "the tail's answer: the tensor 'logits' is missing, there are other"


def odd_answers() -> dict[str, np.ndarray]:
    """Raw answers of a model with one output of FP32 [-1, 4], none of which is one."""
    return {
        "another rank": np.zeros(4, np.float32), "a rank more": np.zeros((1, 1, 4), np.float32),
        "another size": np.zeros((1, 5), np.float32), "another type": np.zeros((1, 4), np.float64),
        "whole numbers": np.zeros((1, 4), np.int32), "texts": np.full((1, 4), b"x", object), "nothing": np.zeros(0, np.float32),
    }  # fmt: skip


@pytest.mark.parametrize("tail", ["skerry", "stock"])
@pytest.mark.parametrize("kind", list(odd_answers()))
def test_a_raw_answer_of_another_type_or_shape_is_not_believed(
    planned_net: Any, tmp_path: Path, tail: str, kind: str
) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(planned_net.folder, folder)
    text = (folder / "split.yaml").read_text()
    (folder / "split.yaml").write_text(text.replace("tail: skerry", f"tail: {tail}"))
    bench = Bench(dataclasses.replace(planned_net, folder=folder))
    bench.model.use(bench.cut)
    bench.tail.refuse = Reply({"logits": odd_answers()[kind]})
    found, right = bench.ask()
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert bench.model.last.where == "continued"
    assert bench.model.last.reason.startswith("the tail's answer: the tensor 'logits' is")
    assert len(bench.model.last.reason) <= 200
    bench.ask()
    assert (bench.model.last.where, bench.model.last.reason) == ("local", "the tail refuses this plan")


def test_a_raw_answer_may_hold_what_is_not_finite_and_more_than_was_asked_for(bench: Bench) -> None:
    bench.model.use(bench.cut)
    bench.tail.refuse = Reply({"logits": np.full((1, 4), np.nan, np.float32), "other": np.zeros(1)})
    found, _ = bench.ask()
    assert np.isnan(found).all()
    assert bench.model.last.where == "split"


def test_a_link_that_is_down_is_not_asked(bench: Bench) -> None:
    bench.tail.link = Estimate(20, 10, up=False)
    bench.ask()
    assert (bench.model.last.where, bench.model.last.reason) == ("local", "the tail does not answer")
    assert bench.model.away == "the tail does not answer"


def test_an_input_that_does_not_fit_is_refused_and_not_sent(bench: Bench) -> None:
    for cut in ("local", "input", bench.cut):
        bench.model.use(cut)
        with pytest.raises(FormatError):
            bench.model(x=np.zeros((1, 3), np.float32))
        with pytest.raises(FormatError, match="'x' is missing"):
            bench.model(y=np.zeros((1, 1, 12, 12), np.float32))


def test_activations_that_are_not_finite_stay_here(bench: Bench) -> None:
    bench.model.use(bench.cut)
    out = bench.model(x=np.full((1, 1, 12, 12), np.inf, np.float32))["logits"]
    assert out.shape == (1, 4)
    assert bench.model.last.where == "continued"
    assert "NaN or infinity" in bench.model.last.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_input_that_is_not_finite_is_answered_as_it_is_without_a_tail(bench: Bench, bad: float) -> None:
    x = np.full((1, 1, 12, 12), bad, np.float32)
    answers = []
    for up in (True, False):
        bench.tail.link = Estimate(20, 10, up=up)
        bench.model.use("input")
        answers.append(bench.model(x=x)["logits"])
        assert bench.model.last.where == ("continued" if up else "local")
    assert "NaN or infinity" not in bench.model.last.reason
    np.testing.assert_array_equal(*answers)
    assert bench.tail._next == 0


def test_a_message_that_is_empty_stays_here_and_says_nothing_against_the_tail(bench: Bench) -> None:
    bench.model.use("input")
    bench.model(x=np.zeros((0, 1, 12, 12), np.float32))
    assert (bench.model.last.where, bench.tail._next) == ("continued", 0)
    assert "is empty" in bench.model.last.reason
    bench.ask()
    assert bench.model.last.where == "cloud"


class Detecting(Bench):
    """The same with a detector, whose answers come back coded: that takes next to nothing, however busy the planner was."""

    def __init__(self, planned: Any) -> None:
        super().__init__(planned)
        plan = self.model.plan
        replies = tuple(dataclasses.replace(one, encode_ms=0.1, decode_ms=0.1) for one in plan.replies)
        self.model._planned = dataclasses.replace(plan, replies=replies)

    def find(self, at: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        x = self.x[at : at + 1]
        return dict(self.model.answer({"x": x})), self.whole.run({"x": x})


@pytest.fixture
def detecting(planned_detector: Any) -> Detecting:
    made = Detecting(planned_detector)
    made.model.use("input", next(one for one in made.model.plan.cut("input").codings if one.kind == "native"))
    return made


def test_a_coded_answer_is_asked_for_where_it_comes_sooner_and_read_right(detecting: Detecting) -> None:
    step = max(detecting.model.plan.replies[0].scales)
    for mbit, asked, gap in ((5.0, "u8", 0.6 * step), (10_000.0, "", 1e-5)):
        detecting.tail.link = Estimate(mbit, 10.0)
        detecting.model.use(
            "input", next(one for one in detecting.model.plan.cut("input").codings if one.kind == "native")
        )
        found, right = detecting.find()
        assert detecting.tail.replies[-1] == asked
        assert detecting.model.last.where == "cloud"
        for name, array in right.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_allclose(found[name], array, atol=gap)


def test_a_tail_that_knows_no_coded_replies_answers_raw_and_is_understood(detecting: Detecting) -> None:
    detecting.tail.refuse = Reply(detecting.whole.run({"x": detecting.x[:1]}))
    found, right = detecting.find()
    assert detecting.tail.replies == ["u8"]
    assert detecting.model.last.where == "cloud"
    np.testing.assert_allclose(found["boxes"], right["boxes"], atol=1e-5)


def hostile_answers(model: SplitModel) -> dict[str, Reply]:
    (reply,) = model.plan.replies
    shapes = {"scores": (1, 1728, 2), "boxes": (1, 1728, 4)}
    good = codec.encode(reply, model.plan.outputs, {name: np.full(s, 0.5, np.float32) for name, s in shapes.items()})
    bomb = zstd.compress(bytes(1 << 28), 1)
    free = [live.shape.count(-1) for live in model.plan.outputs]

    def head(batch: int, body: bytes) -> bytes:
        tensors = b"".join(struct.pack(f">{n + 1}I", *[batch] * n, len(body)) for n in free)
        return b"SK\x01\x02" + tensors + body * 2

    def sent(frame: bytes, coding: str = reply.name) -> Reply:
        return Reply({"frame": np.frombuffer(frame, np.uint8)}, coding=coding)

    return {
        "nothing": sent(b""), "rubbish": sent(b"x" * 500), "short": sent(good[:-1]), "long": sent(good + b"\0"),
        "bomb": sent(head(1, bomb)), "vast": sent(head((1 << 32) - 1, bomb)), "empty": sent(head(0, zstd.compress(b"", 1))),
        "another coding": sent(good, "u16"), "a coding of its own": sent(good, "x" * 999),
        "not bytes": Reply({"frame": np.ones(9, np.float32)}, coding=reply.name),
        "two": Reply({name: np.ones(9, np.uint8) for name in ("a", "b")}, coding=reply.name),
        "no tensor": Reply({}, coding=reply.name), "a frame that is not called one": sent(good, ""),
        "raw, one size more": Reply({n: np.zeros((*s[:-1], s[-1] + 1), np.float32) for n, s in shapes.items()}),
        "raw, of doubles": Reply({name: np.zeros(s) for name, s in shapes.items()}),
        "raw, flat": Reply({name: np.zeros(math.prod(s), np.float32) for name, s in shapes.items()}),
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    ["nothing", "rubbish", "short", "long", "bomb", "vast", "empty", "another coding", "a coding of its own", "not bytes",
     "two", "no tensor", "a frame that is not called one", "raw, one size more", "raw, of doubles", "raw, flat"],
)  # fmt: skip
def test_an_answer_that_is_hostile_is_not_believed_and_the_device_goes_on_by_itself(
    detecting: Detecting, kind: str
) -> None:
    detecting.tail.refuse = hostile_answers(detecting.model)[kind]
    found, right = detecting.find()
    assert detecting.model.last.where == "continued"
    assert detecting.model.last.reason.startswith("the tail's answer")
    assert len(detecting.model.last.reason) < 200
    for name, array in right.items():
        np.testing.assert_allclose(found[name], array, atol=1e-5)
    detecting.find()
    assert (detecting.model.last.where, detecting.model.last.reason) == ("local", "the tail refuses this plan")


def test_a_reply_that_was_not_asked_coded_is_not_read_as_such(bench: Bench) -> None:
    bench.model.use(bench.cut)
    bench.tail.refuse = Reply({"frame": np.zeros(30, np.uint8)}, coding="u8")
    found, right = bench.ask()
    assert bench.model.last.where == "continued"
    np.testing.assert_allclose(found, right, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    script=st.lists(
        st.tuples(
            st.sampled_from(["fine", "slow", "silent", "down", "unavailable", "exhausted"]),
            st.floats(0.3, 200), st.floats(0, 120),
        ),
        min_size=1, max_size=12,
    ),
    private=st.booleans(),
)  # fmt: skip
def test_whatever_the_link_does_every_request_is_answered_rightly_and_within_its_bound(
    planned_net: Any, script: list[tuple[str, float, float]], private: bool
) -> None:
    bench = Bench(planned_net, private=private)
    for at, (mood, mbit, rtt) in enumerate(script):
        bench.tail.link = Estimate(mbit, rtt, up=mood != "down")
        bench.tail.silent = mood == "silent"
        bench.tail.delay_s = 0.9 if mood == "slow" else rtt / 1e3
        bench.tail.refuse = Reply(None, mood, "scripted") if mood in ("unavailable", "exhausted") else None
        start = bench.clock()
        found, right = bench.ask(at)
        ran = bench.model.last
        assert bench.clock() - start < 0.25 + 0.1
        if ran.where in ("local", "continued"):
            np.testing.assert_allclose(found, right, atol=1e-4)
        assert found.argmax() == right.argmax() or ran.where in ("split", "cloud")
        assert not (private and ran.where == "cloud")
        bench.clock.advance(0.4)


@pytest.mark.parametrize("cut", ["input", "c"])
def test_a_stock_tail_gets_whole_tensors_and_its_answer_is_the_whole_models(
    planned_net: Any, tmp_path: Path, cut: str
) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(planned_net.folder, folder)
    text = (folder / "split.yaml").read_text()
    (folder / "split.yaml").write_text(text.replace("tail: skerry", "tail: stock"))
    bench = Bench(dataclasses.replace(planned_net, folder=folder))
    name = bench.cut if cut == "c" else cut
    bench.model.use(name)
    found, right = bench.ask()
    tensors = bench.model.plan.cut(name).tensors
    assert (bench.model.last.where, bench.model.last.cut) == ("cloud" if cut == "input" else "split", name)
    assert bench.model.last.bytes == sum(4 * math.prod(live.shape[1:]) for live in tensors)
    assert bench.tail.replies == []  # nothing was asked in compact mode
    np.testing.assert_allclose(found, right, atol=1e-5)


def test_a_stock_tail_is_never_sent_what_is_not_finite(planned_net: Any, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(planned_net.folder, folder)
    text = (folder / "split.yaml").read_text()
    (folder / "split.yaml").write_text(text.replace("tail: skerry", "tail: stock"))
    bench = Bench(dataclasses.replace(planned_net, folder=folder))
    bench.model.use("input")
    bench.model.answer({"x": np.full_like(bench.x[:1], np.nan)})
    assert (bench.model.last.where, bench.tail._next) == ("continued", 0)


def test_what_does_not_fit_into_memory_is_loaded_only_to_go_on_without_the_tail(
    planned_net: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(planned_net.folder, folder)
    plan = load_plan((folder / "split.yaml").read_text())
    small = next(cut for cut in plan.cuts if cut.name.startswith("c") and cut.codings)
    cuts = tuple(dataclasses.replace(cut, memory_mb=float(cut.after)) for cut in plan.cuts)
    plan = dataclasses.replace(plan, cuts=cuts, memory_mb=small.after + 0.5)
    (folder / "split.yaml").write_text(commented(plan))
    bench = Bench(dataclasses.replace(planned_net, folder=folder))
    loaded = [isinstance(one, ort.Session) for one in bench.model._chain.sessions]
    assert loaded == [at < small.after for at in range(len(plan.segments))]
    bench.model.use(small.name)
    assert bench.ask()[0].argmax() == bench.ask()[1].argmax()
    assert bench.model.last.where == "split"
    bench.tail.silent = True
    found, right = bench.ask()
    assert bench.model.last.where == "continued"
    np.testing.assert_allclose(found, right, atol=1e-5)
