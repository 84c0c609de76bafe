"""Real processes on loopback: a tail that dies, stalls, belongs to another plan, or wants a certificate."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.link_emulator import emulated_link
from cloud.split import split
from cloud.split.measure import measure_links, running_link, running_tail, tail_process
from cloud.tail.store import install
from edge_agent.estimator import MISSES
from edge_agent.infer import SplitModel
from edge_agent.tail_client import LinkClient
from skills import oip, ort
from skills.network import Link
from skills.split_plan import load_plan, plan_hash


@contextlib.contextmanager
def split_model(planned: Any, folder: Path, port: int, **options: Any) -> Iterator[SplitModel]:
    with running_link(folder / "l", port):
        model = SplitModel(planned.folder, link=folder / "l", **options)
        assert reached(model, 10)
        try:
            yield model
        finally:
            model.close()


def reached(model: SplitModel, seconds: float = 10) -> bool:
    assert isinstance(model.tail, LinkClient)
    return model.tail.wait_up(seconds)


def true_cut(model: SplitModel) -> str:
    return next(
        cut.name for cut in model.plan.cuts if cut.name.startswith("c") and any(one.admitted for one in cut.codings)
    )


def settled(model: SplitModel, x: np.ndarray, seconds: float = 60) -> None:
    """Ask until the tail answers: while it loads the plan, or is late on a busy machine, requests finish here.

    Two late answers open the breaker, after a return one does; until it closes requests only run here, which takes no time,
    so it is waited for.
    """
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and reached(model, left):
        model(x=x)
        if model.last.where == "split":
            return
    pytest.fail(f"the tail gave no answer within {seconds:.0f} s: {model.last}")


def left_alone(model: SplitModel, seconds: float = 20) -> bool:
    """Wait until the link says that it leaves the tail alone."""
    assert isinstance(model.tail, LinkClient)
    until = time.monotonic() + seconds
    while model.tail.estimate().up:
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


def stop(child: "subprocess.Popen[bytes]") -> None:
    """Stop a process and wait until all its threads stand: the signal alone returns before that."""
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)


def test_a_tail_killed_while_requests_flow_leaves_no_request_unanswered(planned_net: Any, tmp_path: Path) -> None:
    install(planned_net.folder, tmp_path / "tails")
    whole = ort.session(planned_net.model)
    with (
        tail_process(tmp_path / "tails", tmp_path) as (tail, port),
        emulated_link(port, Link(50, 20)) as link,
        split_model(planned_net, tmp_path, link.port, wait_s=5.0) as model,
    ):
        model.use(true_cut(model))
        settled(model, planned_net.x[:1])
        killer = threading.Timer(0.25, tail.kill)
        killer.start()
        places = []
        for at in range(40):
            x = planned_net.x[at : at + 1]
            found, right = model(x=x)["logits"], whole.run({"x": x})["logits"]
            places.append(model.last.where)
            assert model.last.ms < 600  # a tail that died says so: nobody waits for it
            if model.last.where in ("continued", "local"):
                np.testing.assert_allclose(found, right, atol=1e-4)
            else:
                assert found.argmax() == right.argmax()
            if model.last.where == "local" and places.count("local") > 3:
                break
        killer.join()
        assert places[0] == "split"
        assert places[-1] == "local"
        assert 1 <= places.count("continued") <= 3


def test_a_stalled_link_costs_the_wait_and_then_the_breaker_stays_away(planned_net: Any, tmp_path: Path) -> None:
    install(planned_net.folder, tmp_path / "tails")
    with (
        running_tail(tmp_path / "tails", tmp_path) as port,
        emulated_link(port, Link(50, 10)) as link,
        split_model(planned_net, tmp_path, link.port, wait_s=0.1) as model,
    ):
        model.use(true_cut(model))
        settled(model, planned_net.x[:1])
        link.stall(5)
        places = []
        for at in range(MISSES + 4):
            if at == MISSES:
                assert left_alone(model)  # the link has counted the misses and said so
            model(x=planned_net.x[at : at + 1])
            places.append(model.last.where)
            assert model.last.ms < 300
        assert places[0] == "continued"
        assert places[MISSES:] == ["local"] * 4
        assert reached(model, 10)
        settled(model, planned_net.x[:1])


def test_a_cut_link_comes_back_without_a_restart(planned_net: Any, tmp_path: Path) -> None:
    install(planned_net.folder, tmp_path / "tails")
    with (
        running_tail(tmp_path / "tails", tmp_path) as port,
        emulated_link(port, Link(50, 10)) as link,
        split_model(planned_net, tmp_path, link.port) as model,
    ):
        model.use(true_cut(model))
        settled(model, planned_net.x[:1])
        link.cut(0.5)
        places = [model(x=planned_net.x[:1]) is not None and model.last.where for _ in range(5)]
        assert "split" not in places[1:]
        assert reached(model, 10)
        settled(model, planned_net.x[:1])


def test_a_model_that_stays_local_learns_the_bandwidth_all_the_same(planned_net: Any, tmp_path: Path) -> None:
    install(planned_net.folder, tmp_path / "tails")
    with (
        running_tail(tmp_path / "tails", tmp_path) as port,
        emulated_link(port, Link(0.5, 10)) as link,  # so slow that a busy machine adds little
        split_model(planned_net, tmp_path, link.port) as model,
    ):
        model.use("local")
        assert isinstance(model.tail, LinkClient)
        until = time.monotonic() + 30
        while not model.tail.estimate().mbit and time.monotonic() < until:
            model(x=planned_net.x[:1])
        assert 0.25 < model.tail.estimate().mbit < 0.75
        assert model.last.where == "local"


def test_a_tail_with_another_plan_refuses_in_one_sentence_and_two_plans_live_side_by_side(
    planned_net: Any, small_net: Any, tmp_path: Path
) -> None:
    other = small_net("plain")
    report = split(
        other.model.SerializeToString(), {"x": other.x}, slowdown=10, out=tmp_path / "other", rounds=2, most_samples=4
    )
    install(tmp_path / "other", tmp_path / "tails")
    with (
        running_tail(tmp_path / "tails", tmp_path) as port,
        split_model(planned_net, tmp_path, port, wait_s=10.0) as model,
    ):
        model.use(true_cut(model))
        model(x=planned_net.x[:1])
        assert model.last.where == "continued"
        assert "lies here" in model.last.reason
        install(planned_net.folder, tmp_path / "tails")  # published now: found without a restart
        model._refused_until_s = 0
        settled(model, planned_net.x[:1])
        second = SplitModel(tmp_path / "other", link=tmp_path / "l", wait_s=10.0)
        assert reached(second, 5)
        second.use("input")
        second(x=other.x[:1])
        second(x=other.x[:1])
        assert second.last.where == "cloud"
        second.close()
    assert report.plan_hash != plan_hash(model.plan)


def test_plain_mode_serves_whole_models_tails_and_metadata(planned_net: Any, tmp_path: Path) -> None:
    import grpc

    name = install(planned_net.folder, tmp_path / "tails")
    plan = load_plan((planned_net.folder / "split.yaml").read_text())
    right = ort.session(planned_net.model).run({"x": planned_net.x[:3]})["logits"]
    with running_tail(tmp_path / "tails", tmp_path) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub, pb = oip.service().GRPCInferenceServiceStub(channel), oip.messages()
        assert stub.ServerLive(pb.ServerLiveRequest(), timeout=10).live
        assert stub.ServerReady(pb.ServerReadyRequest(), timeout=10).ready
        assert stub.ModelReady(pb.ModelReadyRequest(name=name), timeout=10).ready
        assert not stub.ModelReady(pb.ModelReadyRequest(name="0" * 16), timeout=10).ready
        meta = stub.ModelMetadata(pb.ModelMetadataRequest(name=name), timeout=10)
        assert [(one.name, one.datatype, list(one.shape)) for one in meta.inputs] == [("x", "FP32", [-1, 1, 12, 12])]
        whole = stub.ModelInfer(oip.to_request(name, oip.Call({"x": planned_net.x[:3]})), timeout=10)
        np.testing.assert_allclose(oip.from_response(whole).arrays["logits"], right, atol=1e-4)
        cut = next(one for one in plan.cuts if one.name.startswith("c"))
        chain = ort.chain([planned_net.folder / one.file for one in plan.segments], ["logits"])
        values = chain.run({"x": planned_net.x[:3]}, 0, cut.after)
        tail = stub.ModelInfer(oip.to_request(f"{name}.{cut.name}", oip.Call(values)), timeout=10)
        np.testing.assert_allclose(oip.from_response(tail).arrays["logits"], right, atol=1e-4)
        one = {"x": planned_net.x[:1]}
        for call, code in (
            (oip.to_request("0" * 16, oip.Call({"x": planned_net.x[:1]})), grpc.StatusCode.NOT_FOUND),
            (oip.to_request(name, oip.Call({"x": planned_net.x[:1, :, :3]})), grpc.StatusCode.INVALID_ARGUMENT),
            (oip.to_request(name, oip.Call(one, parameters={"split.deadline_us": -1})), grpc.StatusCode.INVALID_ARGUMENT),
            (oip.to_request(name, oip.Call(one, parameters={"split.deadline_us": 1})), grpc.StatusCode.DEADLINE_EXCEEDED),
        ):  # fmt: skip
            with pytest.raises(grpc.RpcError) as refused:
                stub.ModelInfer(call, timeout=10)
            assert refused.value.code() is code
            assert refused.value.details()


def certificates(folder: Path) -> Path:
    """Make a CA, a server certificate for 127.0.0.1 and a device certificate, as an enrolment would leave them."""
    import datetime as dt
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = dt.datetime.now(dt.UTC)
    ca_key = ec.generate_private_key(ec.SECP256R1())

    def issue(name: str, key: ec.EllipticCurvePrivateKey, ca: bool = False) -> bytes:
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ca")])
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        builder = (
            builder.serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(1))
            .not_valid_after(now + dt.timedelta(1))
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        builder = builder.add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    folder.mkdir()
    (folder / "ca.pem").write_bytes(issue("ca", ca_key, ca=True))
    for name, prefix in (("server", "server-"), ("device-1", "")):
        key = ec.generate_private_key(ec.SECP256R1())
        plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (folder / f"{prefix}key.pem").write_bytes(key.private_bytes(*plain))
        (folder / f"{prefix}cert.pem").write_bytes(issue(name, key))
    return folder


def test_with_tls_only_a_device_with_a_certificate_is_served(planned_net: Any, tmp_path: Path) -> None:
    install(planned_net.folder, tmp_path / "tails")
    tls, stranger = certificates(tmp_path / "tls"), certificates(tmp_path / "stranger")
    server = [
        "--tls-ca",
        str(tls / "ca.pem"),
        "--tls-cert",
        str(tls / "server-cert.pem"),
        "--tls-key",
        str(tls / "server-key.pem"),
    ]
    with running_tail(tmp_path / "tails", tmp_path, *server) as port:
        with running_link(tmp_path / "l", port, "--tls", str(tls)):
            model = SplitModel(planned_net.folder, link=tmp_path / "l")
            assert reached(model, 10)
            model.use(true_cut(model))
            settled(model, planned_net.x[:1])
            model.close()
        with running_link(tmp_path / "l", port, "--tls", str(stranger)):
            model = SplitModel(planned_net.folder, link=tmp_path / "l")
            assert not reached(model, 1.5)
            model(x=planned_net.x[:1])
            assert model.last.where == "local"
            model.close()


def test_a_terminated_tail_finishes_what_it_began_and_exits_with_nought(planned_net: Any, tmp_path: Path) -> None:
    install(planned_net.folder, tmp_path / "tails")
    with tail_process(tmp_path / "tails", tmp_path) as (tail, port), split_model(planned_net, tmp_path, port) as model:
        model.use("input")
        model(x=planned_net.x[:1])
        tail.send_signal(signal.SIGTERM)
        assert tail.wait(10) == 0
        model(x=planned_net.x[:1])
        assert model.last.where in ("continued", "local")


def test_a_tail_says_ready_when_its_plans_are_warm_and_counts_what_it_answers(planned_net: Any, tmp_path: Path) -> None:
    import http.client

    from cloud.tail.server import Server

    def get(path: str) -> str:
        assert server.metrics_port is not None
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.metrics_port, timeout=10)) as asked:
            asked.request("GET", path)
            return asked.getresponse().read().decode()

    name = install(planned_net.folder, tmp_path / "tails")
    server = Server(tmp_path / "tails", "127.0.0.1:0", metrics_at="127.0.0.1:0", measure_s=0.05)
    try:
        until = time.monotonic() + 30
        while get("/ready") != "ready\n":
            assert time.monotonic() < until
        text = get("/metrics")
        assert "skerry_tail_plans_loaded 1.0" in text
        assert f'skerry_tail_max_batch{{after="0",plan="{name}"}} ' in text
        with split_model(planned_net, tmp_path, server.port, wait_s=10.0) as model:
            model.use("input")
            model(x=planned_net.x[:1])
            assert model.last.where == "cloud"  # warm: the very first request is answered
        text = get("/metrics")
        assert f'skerry_tail_request_seconds_count{{cut="input",plan="{name}"}} 1.0' in text
    finally:
        server.stop(1)


def test_a_tail_that_stands_still_mid_request_costs_the_wait_and_is_found_again(
    planned_net: Any, tmp_path: Path
) -> None:
    install(planned_net.folder, tmp_path / "tails")
    with tail_process(tmp_path / "tails", tmp_path) as (tail, port), split_model(planned_net, tmp_path, port) as model:
        model.use(true_cut(model))
        settled(model, planned_net.x[:1])
        try:
            stop(tail)
            places = [model(x=planned_net.x[:1]) is not None and model.last.where for _ in range(MISSES)]
            assert left_alone(model)  # the link has counted the misses and said so
            places += [model(x=planned_net.x[:1]) is not None and model.last.where for _ in range(4)]
        finally:
            tail.send_signal(signal.SIGCONT)
        assert places[0] == "continued"
        assert places[MISSES:] == ["local"] * 4
        settled(model, planned_net.x[:1])


def test_an_occupied_port_is_one_sentence(tmp_path: Path) -> None:
    with running_tail(tmp_path / "tails", tmp_path) as port:
        done = subprocess.run(
            [sys.executable, "-m", "cloud.tail", "--tails", tmp_path, "--listen", f"127.0.0.1:{port}"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode == 69
    assert "is the port taken?" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_verdict_is_measured_over_real_processes(planned_net: Any) -> None:
    (found,) = measure_links(planned_net.folder, {"x": planned_net.x}, [Link(50, 20)], rounds=3)
    options = {row.option: row for row in found.rows}
    assert set(options) == {"local", "input", "split"}
    assert options["local"].remote == 0
    assert options["split"].remote == options["split"].runs == 3
    assert options["split"].measured_ms.p50 > 20  # the round trip alone
