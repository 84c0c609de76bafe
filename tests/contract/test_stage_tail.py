"""A real tail runs a skill's second stage: over gRPC and the frames, in a process that it replaces when it is lost."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.split.measure import running_link, running_tail
from cloud.tail.guard import Allowed, Guard, NotPermitted
from cloud.tail.stage_host import StageHost, StagesLost
from cloud.tail.stage_worker import load, serve
from cloud.tail.store import Store, install
from edge_agent import ipc
from edge_agent.tail_client import LinkClient
from edge_agent.worker import LoadedSkill
from edge_agent.workers import Load, ZygoteWorkers
from skills import oip
from skills.bundle import build_bundle
from skills.errors import DeadlineExceeded, FormatError, SkerryError, TrustError
from skills.files import write_atomic
from skills.manifest import load_skill
from skills.split_plan import Plan, load_plan, plan_hash
from skills.timer import Local
from skills.wire import encode_json


@pytest.fixture(scope="module")
def tails(placed_skill: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("s") / "tails"
    install(placed_skill.folder, folder)
    return folder


@pytest.fixture(scope="module")
def plan(placed_skill: Any) -> Plan:
    return load_plan((placed_skill.folder / "split.yaml").read_text())


def skill_of(folder: Path, link: Path | None) -> LoadedSkill:
    skill = load_skill((folder / "skill.yaml").read_text(), "skill.yaml")
    return LoadedSkill(skill, folder, {"net": "float"}, Local(), link, 5.0)


@pytest.fixture(scope="module")
def link(tails: Path) -> Iterator[Path]:
    """The link to a tail that may run anybody's stages."""
    with running_tail(tails, tails.parent, "--stages", "any") as port, running_link(tails.parent / "l", port):
        client = LinkClient(tails.parent / "l")
        assert client.wait_up(30)
        client.close()
        yield tails.parent / "l"


@pytest.fixture(scope="module")
def asked(placed_skill: Any, link: Path) -> Iterator[LoadedSkill]:
    """The skill on a device."""
    loaded = skill_of(placed_skill.folder, link)
    until = time.monotonic() + 60
    while remote(loaded, placed_skill.inputs(), "c1").where != "split":  # until the stages are loaded at the tail
        assert time.monotonic() < until, loaded._placed and loaded._placed.last
    yield loaded
    assert loaded._placed is not None
    loaded._placed.close()


def remote(loaded: LoadedSkill, inputs: Any, cut: str) -> Any:
    """Ask as if the tail had never refused."""
    placed: Any = loaded._placed
    placed._refused_until_s = float("-inf")
    placed.use(cut)
    return loaded.run(inputs)


def test_a_real_tail_answers_every_cut_as_the_whole_skill_does(asked: LoadedSkill, placed_skill: Any) -> None:
    alone = skill_of(placed_skill.folder, None)
    for cut, where in (("c1", "split"), ("input", "cloud")):
        for at in range(3):
            inputs = placed_skill.inputs(at)
            found, right = remote(asked, inputs, cut), alone.run(inputs).outputs["logits"]
            assert (found.where, found.cut) == (where, cut), asked._placed.last  # type: ignore[union-attr]
            assert found.outputs["logits"].argmax() == right.argmax()
            assert np.abs(found.outputs["logits"] - right).max() < 0.2 * np.abs(right).max()


async def test_a_devices_own_worker_probes_the_skill_here_and_asks_the_tail_for_its_later_stages(
    link: Path, placed_skill: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "shapes"
    shutil.copytree(placed_skill.folder, folder)
    text = (folder / "split.yaml").read_text()
    assert "policy:\n" in text
    (folder / "split.yaml").write_text(re.sub(r"\n  pin: .*", "\n  pin: c1", text))
    bundle = build_bundle(folder, tmp_path / "shapes.skb")
    (tmp_path / "manifest").write_bytes(encode_json(bundle))
    load = Load(
        "shapes", "1.0.0", "0" * 64, folder, tmp_path / "manifest", {"net": "float"}, "local", 5000, link
    )  # fmt: skip
    call = oip.Call(placed_skill.inputs())
    body, size = oip.encode_call(call)
    pool = ZygoteWorkers(("onnxruntime",))
    try:
        worker = await pool.start(load, lambda worker: None)
        probed, _ = await worker.call({"op": "probe"}, b"", 60)
        answered, _ = await worker.call({"op": "infer", "json_len": size}, body, 60)
    finally:
        await pool.stop()
    assert probed["probe"] == ""
    assert (answered["where"], answered["cut"]) == ("split", "c1")


@pytest.mark.parametrize(
    ("order", "sentence"),
    [(11, "the tail is tired"), (12, "has 'logits' as float32 [1, 5]"), (14, "ended: it is started again")],
)
def test_a_stage_that_fails_at_the_tail_is_run_on_the_device(
    asked: LoadedSkill, placed_skill: Any, order: int, sentence: str
) -> None:
    inputs = placed_skill.inputs(order=order)
    until = time.monotonic() + 60
    while True:  # the test before may have ended the process: its successor is on its way
        found = remote(asked, inputs, "input")
        assert found.where in ("continued", "local")
        reason = asked._placed.last.reason  # type: ignore[union-attr]
        if sentence in reason or time.monotonic() > until:
            break
    assert sentence in reason
    right = skill_of(placed_skill.folder, None).run(inputs).outputs["logits"]
    np.testing.assert_array_equal(found.outputs["logits"], right)


def test_a_tail_without_a_table_runs_nobodys_code_and_says_so(placed_skill: Any, tails: Path, tmp_path: Path) -> None:
    with running_tail(tails, tmp_path) as port, running_link(tmp_path / "l", port):
        loaded = skill_of(placed_skill.folder, tmp_path / "l")
        placed: Any = loaded._placed
        assert placed.tail.wait_up(30)
        assert remote(loaded, placed_skill.inputs(), "c1").where == "continued"
        assert "no table (--allowed) says that it came in a release" in placed.last.reason
        placed.close()


@pytest.fixture
def host(tails: Path, plan: Plan) -> Iterator[StageHost]:
    made = StageHost(tails / plan_hash(plan), plan_hash(plan), plan)
    yield made
    made.close()


def test_a_stage_that_is_late_is_waited_for_no_longer_and_its_answer_goes_to_nobody_else(
    host: StageHost, placed_skill: Any
) -> None:
    slow = placed_skill.inputs(order=13)
    with pytest.raises(DeadlineExceeded, match="classify"):
        host.run(slow, until_s=time.monotonic() + 1.0)
    ordinary = placed_skill.inputs()
    with pytest.raises(StagesLost, match="still busy"):
        host.run(ordinary)
    until, found = time.monotonic() + 30, None
    while found is None and time.monotonic() < until:
        try:
            found = host.run(ordinary)
        except StagesLost:
            threading.Event().wait(0.1)
    assert found is not None
    right = skill_of(placed_skill.folder, None).run(ordinary).outputs["logits"]
    np.testing.assert_allclose(found["logits"], right, atol=1e-5)


def test_a_message_that_does_not_fit_its_types_reaches_no_code(host: StageHost, placed_skill: Any) -> None:
    good = placed_skill.inputs()
    image = good["image"]
    for message in (
        {},
        {**good, "image": image.astype(np.float64)},
        {**good, "image": image[0]},
        {**good, "more": image},
    ):
        with pytest.raises(FormatError, match="the message"):
            host.run(message)


@pytest.mark.parametrize("file", ["stages.py", "net.onnx", "scale.txt", "split.yaml"])
def test_a_file_that_is_not_the_planned_one_is_never_run(tails: Path, tmp_path: Path, plan: Plan, file: str) -> None:
    name = plan_hash(plan)
    shutil.copytree(tails / name, tmp_path / name)
    changed = tmp_path / name / file
    if file == "split.yaml":
        changed.write_text(changed.read_text().replace("name: crop", "name: main"))
    else:
        changed.write_bytes(changed.read_bytes() + b"\n# more")
    with pytest.raises(TrustError):
        Store(tmp_path, may_run=lambda plan: None).get(name)
    with pytest.raises(SkerryError):
        load(tmp_path / name, name)
    with pytest.raises(TrustError):
        StageHost(tmp_path / name, name, plan)


def test_code_runs_only_of_plans_that_the_table_names(tails: Path, tmp_path: Path, plan: Plan) -> None:
    name, table = plan_hash(plan), tmp_path / "allowed.json"
    write_atomic(table, encode_json(Allowed({"cam-1": {name: ("c1",)}})))
    with pytest.raises(NotPermitted, match="runs none"):
        Store(tails).get(name)
    with pytest.raises(NotPermitted, match="no table"):
        Guard().check_code(name)
    with pytest.raises(NotPermitted, match="--stages never"):
        Guard(allowed=table).check_code(name, "never")
    guard = Guard(allowed=table)
    guard.check_code(name)
    with pytest.raises(NotPermitted, match="no table"):
        guard.check_code("0" * 16)
    Guard().check_code(name, "any")
    loaded = Store(tails, may_run=guard.check_code).measure(name, 0.1)
    assert isinstance(loaded.chain, StageHost)
    assert all(one.max_batch == 1 for one in loaded.pace.batching.values())
    loaded.chain.close()


def test_the_process_serves_what_its_tail_asks_and_says_what_went_wrong(
    tails: Path, plan: Plan, placed_skill: Any
) -> None:
    import socket

    from skills.stages import pack

    ours, theirs = socket.socketpair()
    loaded, chain = load(tails / plan_hash(plan), plan_hash(plan))
    thread = threading.Thread(target=serve, args=(theirs, loaded, chain))
    thread.start()
    with ours, theirs:
        for number, (order, word) in enumerate(((0, ""), (11, "tired"), (12, "returned")), 1):
            shapes, body = pack(plan.inputs, placed_skill.inputs(order=order))
            ours.sendall(ipc.frame({"number": number, "stage": 0, "shapes": shapes}, body))
            header, between = ipc.receive(ours) or ({}, memoryview(b""))
            ours.sendall(ipc.frame({"number": number, "stage": 1, "shapes": header["shapes"]}, bytes(between)))
            header, _ = ipc.receive(ours) or ({}, memoryview(b""))
            assert header["number"] == number
            assert word in header.get("error", "")
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(timeout=20)
    assert not thread.is_alive()
