"""A skill whose stages are placed: the device runs the first ones, a scripted tail the others, and the device whatever fails."""

import dataclasses
import shutil
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.split.export import commented
from edge_agent import ipc, worker
from edge_agent.probe import check
from edge_agent.tail_client import Reply
from edge_agent.tail_fake import FakeClock, FakeTail
from edge_agent.worker import LoadedSkill
from skills import oip
from skills.errors import FormatError
from skills.manifest import load_skill
from skills.split import Choice, Estimate
from skills.split_plan import load_plan
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


@pytest.mark.parametrize("bound", ["the plan's", "the asker's"])
def test_a_worker_waits_for_a_silent_tail_no_longer_than_plan_and_asker_allow(
    placed_skill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    folder, most_s = tmp_path / "skill", 0.1
    shutil.copytree(placed_skill.folder, folder)
    plan = load_plan((folder / "split.yaml").read_text())
    if bound == "the plan's":
        plan = dataclasses.replace(plan, policy=dataclasses.replace(plan.policy, slo_ms=most_s * 1e3))
    (folder / "split.yaml").write_text(commented(plan))
    bench = Bench(folder)
    bench.placed.use("c1")
    bench.tail.silent = True
    monkeypatch.setattr(worker, "_load", lambda header: bench.loaded)
    ours, theirs = socket.socketpair()
    serving = threading.Thread(target=worker.serve, args=(theirs,))
    serving.start()
    body, size = oip.encode_call(oip.Call(placed_skill.inputs()))
    with ours:
        ours.settimeout(60)
        ours.sendall(ipc.frame({"op": "load"}))
        left_s = 30.0 if bound == "the plan's" else most_s
        ours.sendall(ipc.frame({"op": "infer", "json_len": size, "left_s": left_s}, body))
        answers = [ipc.receive(ours) for _ in range(2)]
    serving.join(60)
    theirs.close()
    header, answer = answers[1] or ({}, b"")
    assert header["where"] == "continued"
    found = oip.decode_answer(answer, header["json_len"]).arrays["logits"]
    np.testing.assert_array_equal(found, bench.alone.run(placed_skill.inputs()).outputs["logits"])
    assert bench.tail.waits[0] + bench.placed._rest_s(Choice(plan.cut("c1"), None, 0.0)) < most_s


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
