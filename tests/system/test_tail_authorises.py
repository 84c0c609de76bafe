"""A real tail over mutual TLS: a revoked certificate opens nothing, an assignment opens its own plan and no other."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from cloud.authority import Authority
from cloud.tail.guard import Allowed
from cloud.tail.server import Server
from cloud.tail.store import install
from skills import oip
from skills.files import write_atomic
from skills.wire import encode_json

DENIED, UNKNOWN = grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED


def test_only_an_enrolled_device_with_the_plan_assigned_is_served_and_changes_count_at_once(
    planned_net: Any, tmp_path: Path, new_csr: Callable[[], tuple[str, bytes]]
) -> None:
    plan, table = install(planned_net.folder, tmp_path / "tails"), tmp_path / "tails" / "allowed.json"
    write_atomic(table, encode_json(Allowed({"cam-1": {plan: ("input",)}})))
    authority, pb = Authority(tmp_path / "ca", ()), oip.messages()
    tls = (authority.ca_file, authority.server.cert, authority.server.key)
    server = Server(tmp_path / "tails", "127.0.0.1:0", tls=tls, crl=authority.crl_file, allowed=table)
    channels = []

    def join(name: str) -> tuple[Any, str]:
        request, key = new_csr()
        issued = authority.certify(request, name)
        credentials = grpc.ssl_channel_credentials(authority.ca_pem.encode(), key, issued.cert_pem.encode())
        channels.append(grpc.secure_channel(f"127.0.0.1:{server.port}", credentials))
        return oip.service().GRPCInferenceServiceStub(channels[-1]), issued.serial

    def answers(stub: Any) -> list[Any]:
        """Return what each of the three questions, and the sign of life, comes to."""
        found = []
        for call in (
            lambda: stub.ModelReady(pb.ModelReadyRequest(name=plan), timeout=20),
            lambda: stub.ModelMetadata(pb.ModelMetadataRequest(name=plan), timeout=20),
            lambda: stub.ModelInfer(oip.to_request(plan, oip.Call({"x": planned_net.x[:1]})), timeout=20),
            lambda: stub.ServerLive(pb.ServerLiveRequest(), timeout=20),
        ):
            try:
                call()
                found.append(None)
            except grpc.RpcError as error:
                assert error.details().count(". ") == 0
                found.append(error.code())
        return found

    try:
        assert server.wait_warm(30)
        (one, serial), (two, _) = join("cam-1"), join("cam-2")
        assert answers(one) == [None] * 4
        assert answers(two) == [DENIED, DENIED, DENIED, None]
        write_atomic(table, encode_json(Allowed({"cam-1": {plan: ("input",)}, "cam-2": {plan: ("input",)}})))
        assert answers(two) == [None] * 4
        authority.revoke([serial])  # the connection is open already: each call counts, not the handshake
        assert answers(one) == [UNKNOWN] * 4
        assert answers(two) == [None] * 4
        again, _ = join("cam-1")
        assert answers(again) == [None] * 4
    finally:
        for channel in channels:
            channel.close()
        server.stop(0)


def test_the_tables_mean_nothing_without_tls_and_the_command_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cloud.tail.__main__ import main

    with pytest.raises(SystemExit):
        main(["--tails", str(tmp_path), "--allowed", str(tmp_path / "allowed.json")])
    assert "without TLS nobody says who it is" in capsys.readouterr().err
