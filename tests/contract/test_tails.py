"""The fake tail and the real one (link process, gRPC, tail process) keep to the same contract."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.split.measure import running_link, running_tail
from cloud.tail.store import install
from edge_agent.tail_client import LinkClient, Tail
from edge_agent.tail_fake import FakeClock, FakeTail
from skills import codec, ort
from skills.split import Coding, Cut, Plan, load_plan, plan_hash


@pytest.fixture(scope="module")
def real_tail(planned_net: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("t")
    install(planned_net.folder, folder / "tails")
    with running_tail(folder / "tails", folder) as port, running_link(folder / "l", port):
        yield folder / "l"


@pytest.fixture(params=["fake", "real"])
def tail(request: pytest.FixtureRequest, planned_net: Any) -> Iterator[Tail]:
    if request.param == "fake":
        yield FakeTail(planned_net.folder, FakeClock())
        return
    client = LinkClient(request.getfixturevalue("real_tail"))
    assert client.wait_up(10)
    yield client
    client.close()


@pytest.fixture(scope="module")
def plan(planned_net: Any) -> Plan:
    return load_plan((planned_net.folder / "split.yaml").read_text())


def framed(planned: Any, cut: Cut, coding: Coding, plan: Plan) -> bytes:
    chain = ort.chain([planned.folder / one.file for one in plan.segments], ["logits"])
    values = chain.run({"x": planned.x[:1]}, 0, cut.after)
    return codec.encode(coding, cut.tensors, values)


def test_every_cut_and_coding_is_answered_near_the_whole_model(tail: Tail, plan: Plan, planned_net: Any) -> None:
    right = ort.session(planned_net.model).run({"x": planned_net.x[:1]})["logits"]
    for cut in plan.cuts:
        for coding in cut.codings:
            request = tail.send(plan_hash(plan), cut.name, coding.name, framed(planned_net, cut, coding, plan), 5.0)
            reply = tail.wait(request, 5.0)
            assert reply is not None
            assert reply.outputs is not None, reply.error
            found = reply.outputs["logits"]
            assert found.shape == right.shape
            assert found.dtype == right.dtype
            assert np.abs(found - right).max() < (1e-4 if coding.kind == "native" else 3.0)


def test_an_unknown_plan_cut_or_coding_is_invalid_with_a_sentence(tail: Tail, plan: Plan, planned_net: Any) -> None:
    cut = next(one for one in plan.cuts if one.codings)
    frame = framed(planned_net, cut, cut.codings[0], plan)
    name = plan_hash(plan)
    for asked in (
        ("0" * 16, cut.name, cut.codings[0].name),
        (name, "c77", cut.codings[0].name),
        (name, cut.name, "jpeg q1"),
    ):
        reply = tail.wait(tail.send(*asked, frame, 5.0), 5.0)
        assert reply is not None
        assert reply.outputs is None
        assert reply.kind == "invalid"
        assert reply.error


@pytest.mark.parametrize("frame", [b"", b"SK", b"x" * 100, b"SK\x01\x01" + b"\xff" * 40])
def test_a_hostile_frame_is_invalid_with_a_sentence(tail: Tail, plan: Plan, frame: bytes) -> None:
    cut = next(one for one in plan.cuts if one.codings)
    reply = tail.wait(tail.send(plan_hash(plan), cut.name, cut.codings[0].name, frame, 5.0), 5.0)
    assert reply is not None
    assert reply.outputs is None
    assert reply.kind == "invalid"
    assert reply.error


def test_looking_does_not_wait_and_a_cancelled_request_is_forgotten(tail: Tail, plan: Plan, planned_net: Any) -> None:
    cut = next(one for one in plan.cuts if one.codings)
    frame = framed(planned_net, cut, cut.codings[0], plan)
    first = tail.send(plan_hash(plan), cut.name, cut.codings[0].name, frame, 5.0)
    tail.wait(first, 0)
    tail.cancel(first, late=False)
    second = tail.send(plan_hash(plan), cut.name, cut.codings[0].name, frame, 5.0)
    reply = tail.wait(second, 5.0)
    assert second != first
    assert reply is not None
    assert reply.outputs is not None


@pytest.fixture(scope="module")
def real_detector(planned_detector: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("d")
    install(planned_detector.folder, folder / "tails")
    with running_tail(folder / "tails", folder) as port, running_link(folder / "l", port):
        yield folder / "l"


@pytest.fixture(params=["fake", "real"])
def detecting_tail(request: pytest.FixtureRequest, planned_detector: Any) -> Iterator[Tail]:
    if request.param == "fake":
        yield FakeTail(planned_detector.folder, FakeClock())
        return
    client = LinkClient(request.getfixturevalue("real_detector"))
    assert client.wait_up(10)
    yield client
    client.close()


def test_an_answer_comes_coded_where_that_was_asked_for_and_serves_else_raw(
    detecting_tail: Tail, planned_detector: Any
) -> None:
    plan = load_plan((planned_detector.folder / "split.yaml").read_text())
    (reply,), cut = plan.replies, plan.cut("input")
    coding, whole = next(one for one in cut.codings if one.kind == "native"), ort.session(planned_detector.model)
    ordinary = planned_detector.x[:1]
    extreme = ordinary * 30  # its boxes lie beyond what the reply was calibrated for
    step = max(reply.scales)
    for asked, x, coded in ((reply.name, ordinary, True), (reply.name, extreme, False), ("", ordinary, False),
                            ("u4", ordinary, False), ("no such", ordinary, False)):  # fmt: skip
        frame = codec.encode(coding, cut.tensors, {"x": x})
        found = detecting_tail.wait(detecting_tail.send(plan_hash(plan), cut.name, coding.name, frame, 5.0, asked), 5.0)
        assert found is not None
        assert found.outputs is not None, found.error
        assert found.coding == (asked if coded else "")
        outputs = codec.decode_reply(reply, plan.outputs, found.outputs) if coded else found.outputs
        for name, array in whole.run({"x": x}).items():
            assert outputs[name].shape == array.shape
            assert np.abs(outputs[name] - array).max() < (0.6 * step if coded else 1e-4 * max(1.0, np.abs(array).max()))


def test_the_estimate_is_there_without_waiting(tail: Tail) -> None:
    found = tail.estimate()
    assert found.up
    assert found.mbit >= 0
    assert found.rtt_ms >= 0
