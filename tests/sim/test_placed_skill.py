"""A skill whose stages are placed: the device runs the first ones, a scripted tail the others, and the device whatever fails."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_agent.probe import check
from edge_agent.tail_client import Reply
from edge_agent.tail_fake import FakeClock, FakeTail
from edge_agent.worker import LoadedSkill
from skills.errors import FormatError
from skills.manifest import load_skill
from skills.split import Estimate
from skills.stages import StageChain
from skills.timer import Local


class Bench:
    """The skill as a device loads it, and the tail that it asks."""

    def __init__(self, folder: Path, tail_stages: StageChain | None = None) -> None:
        skill = load_skill((folder / "skill.yaml").read_text(), "skill.yaml")
        self.alone = LoadedSkill(skill, folder, {"net": "float"}, Local(), None, 0.25)
        self.tail: Any = FakeTail(folder, FakeClock(), stages=tail_stages or self.alone._placed._chain)
        self.loaded = LoadedSkill(skill, folder, {"net": "float"}, Local(), self.tail, 0.25)
        self.placed = self.loaded._placed
        assert self.placed is not None

    def ask(self, inputs: Any, cut: str = "c1") -> tuple[Any, Any, Any]:
        self.placed.use(cut)
        answer = self.loaded.run(inputs)
        return answer, answer.outputs["logits"], self.alone.run(inputs).outputs["logits"]


@pytest.fixture
def bench(placed_skill: Any) -> Bench:
    return Bench(placed_skill.folder)


def test_the_tail_answers_as_the_whole_skill_does_within_the_coding(bench: Bench, placed_skill: Any) -> None:
    for at in range(4):
        answer, found, right = bench.ask(placed_skill.inputs(at))
        assert (answer.where, answer.cut) == ("split", "c1")
        assert found.argmax() == right.argmax()
        assert np.abs(found - right).max() < 0.2 * np.abs(right).max()
    assert bench.ask(placed_skill.inputs(), "input")[0].where == "cloud"


def test_a_silent_tail_costs_the_wait_and_the_device_runs_the_other_stages(bench: Bench, placed_skill: Any) -> None:
    bench.tail.silent = True
    answer, found, right = bench.ask(placed_skill.inputs())
    assert answer.where == "continued"
    np.testing.assert_array_equal(found, right)


def test_a_link_that_is_down_leaves_all_stages_here(bench: Bench, placed_skill: Any) -> None:
    bench.tail.link = Estimate(20, 10, up=False)
    answer, found, right = bench.ask(placed_skill.inputs())
    assert (answer.where, answer.cut) == ("local", "local")
    np.testing.assert_array_equal(found, right)


def test_a_stage_that_fails_at_the_tail_is_run_here_and_not_asked_for_a_minute(placed_skill: Any) -> None:
    def fails(message: Any) -> Any:
        raise FormatError("stage 'classify': it is tired")

    bench = Bench(placed_skill.folder, StageChain((fails, fails), ("crop", "classify")))
    answer, found, right = bench.ask(placed_skill.inputs())
    assert answer.where == "continued"
    assert bench.placed.last.reason == "stage 'classify': it is tired"
    np.testing.assert_array_equal(found, right)
    assert bench.loaded.run(placed_skill.inputs()).where == "local"


@pytest.mark.parametrize(
    "answer",
    [
        {"logits": np.zeros((1, 5), np.float32)},
        {"logits": np.zeros((1, 4), np.float64)},
        {"logits": np.zeros((1, 4), np.float32), "more": np.zeros(1)},
        {},
    ],
)
def test_an_answer_that_does_not_fit_its_types_is_none(bench: Bench, placed_skill: Any, answer: Any) -> None:
    bench.tail.refuse = Reply(answer)
    found = bench.ask(placed_skill.inputs())
    assert found[0].where == "continued"
    assert bench.placed.last.reason.startswith("the tail's answer")
    np.testing.assert_array_equal(found[1], found[2])


def test_a_message_that_does_not_fit_its_types_stays_here(bench: Bench, placed_skill: Any) -> None:
    answer, found, right = bench.ask(placed_skill.inputs(count=2))  # the plan was made of single pictures
    assert answer.where == "continued"
    assert "the plan says" in bench.placed.last.reason
    np.testing.assert_array_equal(found, right)
    assert not bench.tail.replies


def test_the_probe_asks_no_tail(bench: Bench) -> None:
    assert check(bench.loaded) == ""
    assert not bench.tail.replies


def test_a_plan_of_other_stages_or_of_none_is_refused(placed_skill: Any, planned_net: Any) -> None:
    from edge_agent.infer import SplitModel

    with pytest.raises(FormatError, match="places other stages"):
        SplitModel(placed_skill.folder, stages=StageChain((), ("classify",)))
    with pytest.raises(FormatError, match="name it as the skill's placement"):
        SplitModel(placed_skill.folder)
    with pytest.raises(FormatError, match="0 stages"):
        SplitModel(planned_net.folder, stages=StageChain((), ()))
