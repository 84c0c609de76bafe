"""The fake tail and the real one (link process, gRPC, tail process) keep to the same contract."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.authority import Authority
from cloud.split.measure import running_link, running_tail
from cloud.tail.server import Server
from cloud.tail.store import Loaded, Store, install
from edge_agent.calls import LOADING
from edge_agent.links import LinkKeeper
from edge_agent.tail_client import LinkClient, Tail
from edge_agent.tail_fake import FakeClock, FakeTail
from skills import codec, oip, ort
from skills.coding import Coding
from skills.split_plan import Cut, Plan, load_plan, plan_hash


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
            assert found.flags.writeable
            assert found.flags.aligned
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


def plain(planned: Any, cut: Cut, plan: Plan, count: int = 1) -> dict[str, np.ndarray]:
    """Return the tensors of a cut as they are, for the first `count` inputs."""
    chain = ort.chain([planned.folder / one.file for one in plan.segments], ["logits"])
    values = chain.run({"x": planned.x[:count]}, 0, cut.after)
    return {live.name: values[live.name] for live in cut.tensors}


@pytest.mark.parametrize("count", [1, 3])
def test_every_cut_that_is_asked_for_plain_is_answered_as_the_whole_model_does(
    tail: Tail, plan: Plan, planned_net: Any, count: int
) -> None:
    right = ort.session(planned_net.model).run({"x": planned_net.x[:count]})["logits"]
    for cut in plan.cuts:
        if cut.name == "local":
            continue
        asked = tail.send_plain(plan_hash(plan), cut.name, plain(planned_net, cut, plan, count), 5.0, cut.tail_ms.p50)
        reply = tail.wait(asked, 5.0)
        assert reply is not None
        assert reply.outputs is not None, reply.error
        assert reply.coding == ""
        assert reply.outputs["logits"].dtype == right.dtype
        np.testing.assert_allclose(reply.outputs["logits"], right, atol=1e-4)


@pytest.mark.parametrize(
    "fault",
    ["plan", "cut", "missing", "rank", "size", "type", "not finite"],
)
def test_a_plain_request_that_fits_no_model_is_invalid_with_a_sentence(
    tail: Tail, plan: Plan, planned_net: Any, fault: str
) -> None:
    for cut in plan.cuts:
        if cut.name == "local":
            continue
        arrays = plain(planned_net, cut, plan)
        name, array = next(iter(arrays.items()))
        arrays |= {
            "rank": {name: array[0]}, "size": {name: np.repeat(array, 2, -1)}, "type": {name: array.astype(np.float64)},
            "not finite": {name: np.full_like(array, np.nan)},
        }.get(fault, {})  # fmt: skip
        if fault == "missing":
            arrays = {"nonsense": array}
        asked = tail.send_plain(
            "0" * 16 if fault == "plan" else plan_hash(plan), "c77" if fault == "cut" else cut.name, arrays, 5.0
        )
        reply = tail.wait(asked, 5.0)
        assert reply is not None
        assert reply.outputs is None
        assert reply.kind == "invalid"
        assert reply.error


@pytest.fixture
def joined(new_csr: Any, tmp_path: Path) -> tuple[Authority, Path]:
    """A device's CA, and the folder with the certificate that it gave to the device."""
    authority, folder = Authority(tmp_path / "ca", ()), tmp_path / "identity"
    request, key = new_csr()
    folder.mkdir()
    for name, content in (
        ("cert.pem", authority.certify(request, "cam-1").cert_pem.encode()),
        ("key.pem", key),
        ("ca.pem", authority.ca_pem.encode()),
    ):
        (folder / name).write_bytes(content)
    return authority, folder


@pytest.mark.parametrize("own_ca", [True, False])
def test_a_tail_of_ones_own_vouched_for_by_another_ca_is_reached_with_the_devices_certificate(
    joined: tuple[Authority, Path], planned_net: Any, plan: Plan, tmp_path: Path, *, own_ca: bool
) -> None:
    devices, identity = joined
    install(planned_net.folder, tmp_path / "tails")
    other = Authority(tmp_path / "other", ())
    # The server's own certificate is the other CA's; the devices that it lets in are those of the first.
    server = Server(tmp_path / "tails", "127.0.0.1:0", tls=(devices.ca_file, other.server.cert, other.server.key))
    assert server.wait_warm(30)
    keeper = LinkKeeper(f"grpcs://127.0.0.1:{server.port}", identity, other.ca_file if own_ca else None)

    async def ask() -> None:
        path = keeper.open()
        assert path is not None
        async with asyncio.timeout(30):
            while not path.exists():  # noqa: ASYNC110  a file says nothing of itself
                await asyncio.sleep(0.02)
        client = LinkClient(path)
        assert await asyncio.to_thread(client.wait_up, 20 if own_ca else 1) == own_ca
        if own_ca:
            arrays = plain(planned_net, plan.cut("input"), plan)
            asked = client.send_plain(plan_hash(plan), "input", arrays, 10.0)
            reply = await asyncio.to_thread(client.wait, asked, 10.0)
            assert reply is not None
            assert reply.outputs is not None, reply.error
        client.close()
        await keeper.close()

    try:
        asyncio.run(ask())
    finally:
        server.stop(0)


def test_a_plan_that_loads_slowly_takes_the_tail_away_from_nobody(
    planned_net: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import grpc

    name, load = install(planned_net.folder, tmp_path / "tails"), Store._load
    begun, go_on = threading.Event(), threading.Event()

    def slow(store: Store, plan: str) -> Loaded:
        begun.set()
        assert go_on.wait(60)
        return load(store, plan)

    monkeypatch.setattr(Store, "_load", slow)
    server, pb = Server(tmp_path / "tails", "127.0.0.1:0"), oip.messages()
    try:
        assert begun.wait(20)
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = oip.service().GRPCInferenceServiceStub(channel)
            asking = [stub.ModelReady.future(pb.ModelReadyRequest(name=name), timeout=30) for _ in range(90)]
            request = oip.to_request(name, oip.Call({"x": planned_net.x[:1]}))
            with pytest.raises(grpc.RpcError, match="is being loaded: ask again") as refused:
                stub.ModelInfer(request, timeout=30)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE  # not now; the plan is not a wrong one
            assert LOADING in refused.value.trailing_metadata()
            with running_link(tmp_path / "l", server.port):
                client = LinkClient(tmp_path / "l")
                assert client.wait_up(10)
                for _ in range(3):
                    reply = client.wait(client.send_plain(name, "input", {"x": planned_net.x[:1]}, 10.0), 10.0)
                    assert reply is not None
                    assert reply.kind == "loading"
                assert client.estimate().up
                client.close()
            assert stub.ServerLive(pb.ServerLiveRequest(), timeout=30).live
            assert not any(one.result().ready for one in asking)
            go_on.set()
            assert server.wait_warm(30)
            assert stub.ModelReady(pb.ModelReadyRequest(name=name), timeout=30).ready
            assert stub.ModelInfer(request, timeout=30).outputs[0].name == "logits"
    finally:
        go_on.set()
        server.stop(0)


def test_the_estimate_is_there_without_waiting(tail: Tail) -> None:
    found = tail.estimate()
    assert found.up
    assert found.mbit >= 0
    assert found.rtt_ms >= 0
