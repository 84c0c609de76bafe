"""A small model that asks a big one: what is asked, how long, and that an answer is there whatever becomes of the question."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cloud.split.check import check_plan
from cloud.split.export import commented
from cloud.split.joint import choose_threshold, describe, fit_temperature, join
from edge_agent.infer import SplitModel
from edge_agent.tail_client import Reply
from edge_agent.tail_fake import FakeClock, FakeTail
from skills import ort
from skills.confidence import confidence
from skills.errors import FormatError, NotReached, UsageError
from skills.files import sha256_hex
from skills.network import Link
from skills.split import Estimate
from skills.split_plan import Millis, Policy, load_plan
from skills.timer import Timed


class Still:
    """A timer that costs no time on the fake clock."""

    def run(self, work: Any, halt: Any = None) -> Timed[Any]:
        return Timed(work(), 0.1)

    def device_ms(self, wall_ms: float, cpu_ms: float) -> float:
        return wall_ms


def blurred(model: bytes) -> bytes:
    """A worse model: the same net with noise in its last layer."""
    made = onnx.load_model_from_string(model)
    chance = np.random.default_rng(0)
    for item in made.graph.initializer:
        if item.name == "head":
            values = onnx.numpy_helper.to_array(item)
            noisy = values + chance.normal(0, 0.9 * values.std(), values.shape).astype(np.float32)
            item.CopyFrom(onnx.numpy_helper.from_array(noisy, "head"))
    return made.SerializeToString()


@pytest.fixture(scope="module")
def joined(planned_net: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("joint")
    plan = folder / "plan"
    shutil.copytree(planned_net.folder, plan)
    small = folder / "small.onnx"
    small.write_bytes(blurred(planned_net.model))
    return plan, join(plan, small, {"x": planned_net.x}), small


def resaid(folder: Path, **changes: Any) -> None:
    """Write the plan again with another small model in it."""
    plan = load_plan((folder / "split.yaml").read_text())
    assert plan.small is not None
    said = {key.removeprefix("small_"): value for key, value in changes.items()}
    (folder / "split.yaml").write_text(
        commented(dataclasses.replace(plan, small=dataclasses.replace(plan.small, **said)))
    )


def rubbish(folder: Path) -> None:
    """Put something that is no model in the small one's place, with its hash in the plan."""
    (folder / "small/small.onnx").write_bytes(b"rubbish")
    resaid(folder, small_sha256=sha256_hex(b"rubbish"))


def bench(folder: Path, **options: Any) -> tuple[SplitModel, FakeTail, FakeClock]:
    clock = FakeClock()
    tail = FakeTail(folder, clock)
    return SplitModel(folder, timer=Still(), link=tail, clock=clock, **options), tail, clock  # type: ignore[arg-type]


def sure_and_unsure(folder: Path, small: Path, x: np.ndarray) -> tuple[int, int]:
    plan = load_plan((folder / "split.yaml").read_text())
    assert plan.small is not None
    scores = ort.session(small).run({"x": x})["logits"]
    values = [confidence(row, "classes", plan.small.temperature) for row in scores]
    return int(np.argmax(values)), int(np.argmin(values))


def test_what_is_joined_is_in_the_plan_with_what_was_measured(joined: Any) -> None:
    folder, found, small = joined
    plan = load_plan((folder / "split.yaml").read_text())
    assert plan.small == found.small
    assert (folder / "small/small.onnx").read_bytes() == small.read_bytes()
    assert check_plan(folder).faults == ()
    assert 0 < plan.small.asked < 1
    assert plan.small.accuracy >= found.alone
    assert "the small model answers" in describe(plan, Link(20, 30))


@pytest.mark.parametrize(
    ("small_ms", "threshold", "sentence"),
    [
        (Millis(1, 1.2), 0.5, r"so it pays; together they reach 90.0%, a drop of \+0.3 points \(95 % interval -0.2 … \+0.8\)"),
        (Millis(1, 99), 0.5, "so it does not pay: that is not clearly faster"),
        (Millis(98, 99), 0.5, "so it does not pay: that is not clearly faster"),
        (Millis(1, 1.2), 0.0, "the big model would never be asked: the small one alone does, .* joining them does not pay"),
        (Millis(99, 101), 0.0, "never be asked: .* but that is not clearly faster .* joining them does not pay"),
    ],
)  # fmt: skip
def test_joining_pays_only_where_it_is_clearly_faster_and_the_big_model_is_asked(
    joined: Any, small_ms: Millis, threshold: float, sentence: str
) -> None:
    plan = load_plan((joined[0] / "split.yaml").read_text())
    local = dataclasses.replace(plan.cut("local"), device_ms=Millis(100, 101))
    small = dataclasses.replace(
        plan.small, device_ms=small_ms, threshold=threshold, asked=0.1 if threshold else 0.0, accuracy=0.9, drop=0.3,
        drop_ci95=(-0.2, 0.8),
    )  # fmt: skip
    plan = dataclasses.replace(plan, cuts=(*plan.cuts[:-1], local), small=small, policy=Policy(pin="local"))
    said = describe(plan, Link(20, 30))
    assert re.search(sentence, said), said


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "small/small.onnx").unlink(), "small/small.onnx is missing from"),
        (lambda folder: (folder / "small/small.onnx").write_bytes(b"rubbish"), "small/small.onnx has sha256"),
        (lambda folder: resaid(folder, small_inputs=("nobody",)), "small/small.onnx has no input 'nobody', it has x"),
        (lambda folder: resaid(folder, small_outputs=("logits", "logits")), "small names 2 outputs, the plan has 1"),
        (rubbish, "small/small.onnx does not load"),
    ],
    ids=["missing", "changed", "another input", "an output too many", "no model"],
)  # fmt: skip
def test_a_small_model_that_cannot_serve_is_a_fault_of_its_plan(
    joined: Any, tmp_path: Path, change: Any, sentence: str
) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(joined[0], folder)
    change(folder)
    faults = check_plan(folder).faults
    assert len(faults) == 1
    assert sentence in faults[0]


def worse_detector(model: bytes, *, raw: bool = False) -> bytes:
    """Return the detector with noise in its boxes; `raw`: with scores that are none from 0 to 1."""
    made = onnx.load_model_from_string(model)
    chance = np.random.default_rng(0)
    for item in made.graph.initializer:
        if item.name == "boxes_w":
            values = onnx.numpy_helper.to_array(item)
            noisy = values + chance.normal(0, 0.05, values.shape).astype(np.float32)
            item.CopyFrom(onnx.numpy_helper.from_array(noisy, item.name))
    if raw:
        made.graph.node[-1].op_type = "Neg"
    return bytes(made.SerializeToString())


def test_a_detector_asks_by_its_highest_score_and_is_marked_by_how_close_it_comes(
    planned_detector: Any, tmp_path: Path
) -> None:
    folder, small = tmp_path / "plan", tmp_path / "small.onnx"
    shutil.copytree(planned_detector.folder, folder)
    small.write_bytes(worse_detector(planned_detector.model))
    x = np.random.default_rng(5).normal(0, 1, (100, 1, 48, 48)).astype(np.float32)
    x[::3] = 0.0  # nothing to see
    found = join(folder, small, {"x": x})
    plan = load_plan((folder / "split.yaml").read_text())
    assert plan.small == found.small
    assert found.small.scores == "detections"
    assert check_plan(folder).faults == ()
    assert 0 < found.alone < found.big == 1.0
    assert found.alone <= found.together
    assert found.small.drop <= plan.max_drop + 1
    model, _, _ = bench(folder)
    model.answer({"x": x[:1]})
    scores = ort.session(small).run({"x": x[:1]})["scores"]
    assert model.sure == pytest.approx(confidence(scores, "detections", found.small.temperature))
    small.write_bytes(worse_detector(planned_detector.model, raw=True))
    with pytest.raises(FormatError, match="first output 'scores' holds no scores from 0 to 1"):
        join(folder, small, {"x": x})


def test_an_easy_input_is_answered_here_and_a_hard_one_by_the_big_model(joined: Any, planned_net: Any) -> None:
    folder, _, small = joined
    model, tail, _ = bench(folder)
    easy, hard = sure_and_unsure(folder, small, planned_net.x)
    model.use("input")
    answer = model.answer({"x": planned_net.x[easy : easy + 1]})["logits"]
    np.testing.assert_allclose(
        answer, ort.session(small).run({"x": planned_net.x[easy : easy + 1]})["logits"], atol=1e-5
    )
    assert model.last.where == "local"
    assert model.last.bytes == 0
    answer = model.answer({"x": planned_net.x[hard : hard + 1]})["logits"]
    right = ort.session(planned_net.model).run({"x": planned_net.x[hard : hard + 1]})["logits"]
    assert model.last.where == "cloud"
    assert answer.argmax() == right.argmax()
    assert not tail.cancelled


def test_a_question_that_is_not_answered_in_time_has_the_small_models_answer(joined: Any, planned_net: Any) -> None:
    folder, _, small = joined
    model, tail, clock = bench(folder)
    _, hard = sure_and_unsure(folder, small, planned_net.x)
    model.use("input")
    tail.silent = True
    x = planned_net.x[hard : hard + 1]
    start = clock()
    answer = model.answer({"x": x}, deadline_s=0.1)["logits"]
    assert clock() - start <= 0.1
    np.testing.assert_allclose(answer, ort.session(small).run({"x": x})["logits"], atol=1e-5)
    assert model.last.where == "continued"
    assert "the small model is" in model.last.reason
    assert tail.cancelled == [(1, True)]


def test_without_a_link_the_small_model_answers_and_says_how_sure_it_is(joined: Any, planned_net: Any) -> None:
    folder, _, small = joined
    model, tail, _ = bench(folder)
    tail.link = Estimate(20, 10, up=False)
    _, hard = sure_and_unsure(folder, small, planned_net.x)
    model.answer({"x": planned_net.x[hard : hard + 1]})
    assert model.last.where == "local"
    assert 0 < model.sure < 1
    assert f"only {model.sure:.0%} sure" in model.last.reason


def test_where_staying_local_is_best_the_big_model_answers_a_hard_input_here(joined: Any, planned_net: Any) -> None:
    folder, _, small = joined
    model, tail, _ = bench(folder)
    tail.link = Estimate(0.001, 2000)
    _, hard = sure_and_unsure(folder, small, planned_net.x)
    x = planned_net.x[hard : hard + 1]
    answer = model.answer({"x": x})["logits"]
    assert (model.last.where, model.last.cut, model.last.reason) == ("local", "local", "")
    np.testing.assert_allclose(answer, ort.session(planned_net.model).run({"x": x})["logits"], atol=1e-5)
    answer = model.answer({"x": x}, deadline_s=1e-9)["logits"]  # there is no time for it
    np.testing.assert_allclose(answer, ort.session(small).run({"x": x})["logits"], atol=1e-5)
    assert model.last.reason.endswith("ms here")


def test_an_input_that_is_missing_is_named(joined: Any, planned_net: Any) -> None:
    model, _, _ = bench(joined[0])
    with pytest.raises(FormatError, match="'x' is missing, there are y"):
        model.answer({"y": planned_net.x[:1]})


def test_a_tail_that_refuses_the_plan_leaves_a_hard_input_to_the_small_model(joined: Any, planned_net: Any) -> None:
    folder, _, small = joined
    model, tail, _ = bench(folder)
    tail.refuse = Reply(None, "invalid", "no plan lies here")
    _, hard = sure_and_unsure(folder, small, planned_net.x)
    x = planned_net.x[hard : hard + 1]
    model.use("input")
    for said in ("no plan lies here", "and the tail refuses this plan"):
        answer = model.answer({"x": x})["logits"]
        assert said in model.last.reason
        np.testing.assert_allclose(answer, ort.session(small).run({"x": x})["logits"], atol=1e-5)


def test_nothing_found_is_hard() -> None:
    assert confidence(np.zeros((0,)), "detections", 1.0) == 0.0
    assert confidence(np.zeros((1, 0, 4)), "detections", 1.0) == 0.0
    assert confidence(np.array([np.nan, 1.0]), "classes", 1.0) == 0.0
    assert confidence(np.array([0.1, 0.9]), "detections", 1.0) == pytest.approx(0.9)
    assert confidence(np.array([0.0, 1.0]), "detections", 1.0) < 1


def test_the_temperature_undoes_what_made_the_scores_too_bold() -> None:
    chance = np.random.default_rng(0)
    honest = chance.normal(0, 1.5, (4000, 5))
    shares = np.exp(honest) / np.exp(honest).sum(1, keepdims=True)
    truth = np.array([chance.choice(5, p=row) for row in shares])
    assert fit_temperature(honest * 3, truth) == pytest.approx(3, rel=0.1)


def test_the_threshold_is_the_lowest_that_reaches_the_target() -> None:
    sure = np.array([0.1, 0.4, 0.6, 0.9])
    small, big = np.array([False, False, True, True]), np.array([True, True, True, True])
    assert choose_threshold(sure, small, big, 1.0) == 0.6
    assert choose_threshold(sure, small, big, 0.75) == 0.4
    assert choose_threshold(sure, small, big, 0.5) == 0.0
    with pytest.raises(NotReached, match="reach 50.0% at best, the target is 90.0%"):
        choose_threshold(sure, np.zeros(4, bool), np.array([True, True, False, False]), 0.9)
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        choose_threshold(sure, small, big, 90)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), min_size=1, max_size=30),
    st.floats(0.01, 1),
)
@example([(0.9999996, True, True), (0.9999993, False, True)], 1.0)
def test_a_threshold_is_what_a_plan_holds_and_reaches_the_target_as_such(
    answers: list[tuple[float, bool, bool]], target: float
) -> None:
    sure, small, big = (np.array(one) for one in zip(*answers, strict=True))
    try:
        threshold = choose_threshold(sure, small, big, target)
    except NotReached:
        return
    assert threshold == round(threshold, 6)
    assert threshold == 1 or np.where(sure >= threshold, small, big).mean() >= target


def test_what_a_plan_says_of_a_small_model_was_measured_with_the_numbers_in_it(
    planned_net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, small = tmp_path / "plan", tmp_path / "small.onnx"
    shutil.copytree(planned_net.folder, folder)
    small.write_bytes(blurred(planned_net.model))
    heat, used = iter([1.23456789]), set[float]()

    def seen(scores: Any, kind: Any, temperature: float) -> float:
        used.add(temperature)
        return confidence(scores, kind, temperature) * 1e-7 + 0.9999995

    monkeypatch.setattr("cloud.split.joint.fit_temperature", lambda *_: next(heat))
    monkeypatch.setattr("cloud.split.joint.confidence", seen)
    found = join(folder, small, {"x": planned_net.x}, target=0.9)
    assert used == {found.small.temperature}
    # All are as sure to six digits: the big model is asked about all or about none.
    assert found.small.asked == (1.0 if found.small.threshold == 1.0 else 0.0)


def test_a_small_model_whose_weights_lie_beside_it_is_taken_with_them(planned_net: Any, tmp_path: Path) -> None:
    folder, beside = tmp_path / "plan", tmp_path / "beside"
    shutil.copytree(planned_net.folder, folder)
    beside.mkdir()
    onnx.save(
        onnx.load_from_string(blurred(planned_net.model)), beside / "small.onnx",
        save_as_external_data=True, location="small.bin", size_threshold=0,
    )  # fmt: skip
    x = planned_net.x
    right = ort.session(beside / "small.onnx").run({"x": x[:1]})["logits"]
    join(folder, beside / "small.onnx", {"x": x}, target=0.5)
    shutil.rmtree(beside)
    model, tail, _ = bench(folder)
    tail.link = Estimate(20, 10, up=False)
    np.testing.assert_array_equal(model.answer({"x": x[:1]})["logits"], right)


def test_too_few_inputs_and_another_answer_are_refused(joined: Any, planned_net: Any) -> None:
    folder, _, small = joined
    before = (folder / "split.yaml").read_bytes()
    with pytest.raises(FormatError, match="takes at least 100"):
        join(folder, small, {"x": planned_net.x[:99]})
    with pytest.raises(NotReached):
        join(folder, small, {"x": planned_net.x, "y": np.full(len(planned_net.x), 3)}, target=1.0)
    assert (folder / "split.yaml").read_bytes() == before
