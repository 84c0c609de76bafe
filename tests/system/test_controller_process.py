"""A real controller process with a real broker: started, used over its API and MQTT, killed, and left behind clean."""

import asyncio
import contextlib
import datetime as dt
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloud import supervise
from cloud.broker import find_mosquitto
from cloud.config import Settings
from cloud.device_fake import FakeDevice
from cloud.supervise import Running
from skills import signing
from skills.bundle import BundleFile
from skills.desired import ObjectRef
from skills.errors import SkerryError, StorageError, Unreachable
from skills.mqtt import Mqtt, TlsFiles

Build = Callable[..., BundleFile]
CONTROLLER = ["-m", "cloud.controller"]
BROKERS = [pytest.param("mosquitto", marks=pytest.mark.mosquitto), "amqtt"]


def settings(data: Path, **more: Any) -> Settings:
    return Settings(data=data, api_port=0, mqtt_port=0, tail_port=0, **more)


class Api:
    """The API over real TLS."""

    def __init__(self, running: Running) -> None:
        self.running = running
        self.tls = ssl.create_default_context(cafile=str(running.ca))
        headers = {"Authorization": f"Bearer {running.token}"}
        self.http = httpx.Client(
            base_url=running.run.url, headers=headers, verify=self.tls, timeout=20, trust_env=False
        )

    def call(self, method: str, path: str, **more: Any) -> Any:
        response = self.http.request(method, path, **more)
        assert response.status_code == 200, response.text
        return response.json()

    def publish(self, bundle: BundleFile, data: Path) -> None:
        for sha256, content in {**bundle.objects, bundle.digest: bundle.manifest_bytes}.items():
            self.call("PUT", f"/v1/objects/{sha256}", content=content)
        key = signing.load_key(data / "keys" / "publisher.pem")
        target = signing.release_target(bundle.bundle.skill.name, bundle.bundle.skill.version)
        ref = ObjectRef(bundle.digest, len(bundle.manifest_bytes))
        current = self.http.get("/v1/repository/targets").content
        targets = signing.add_release(current, target, ref, key, dt.datetime.now(dt.UTC)).decode()
        self.call("POST", "/v1/releases", json={"manifest_sha256": bundle.digest, "targets_json": targets})


@pytest.fixture
def connect() -> Iterator[Callable[[Running], Api]]:
    opened: list[Api] = []

    def new(running: Running) -> Api:
        opened.append(Api(running))
        return opened[-1]

    yield new
    for api in opened:
        api.http.close()


Connect = Callable[[Running], Api]


@pytest.fixture(params=BROKERS)
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Running]:
    embedded = request.param == "amqtt"
    if not embedded and find_mosquitto() is None:
        if os.environ.get("SKERRY_REQUIRE_MOSQUITTO") == "1":
            pytest.fail("no mosquitto is installed")
        pytest.skip("no mosquitto is installed")
    data = tmp_path / "data"
    yield supervise.start(settings(data, embedded_broker=embedded))
    supervise.stop(data)


def test_a_device_joins_by_its_invitation_and_takes_a_release_over_mutual_tls(
    running: Running, connect: Connect, tmp_path: Path, small_bundle: Build, new_csr: Callable[[], tuple[str, bytes]]
) -> None:
    api, data = connect(running), tmp_path / "data"
    invitation = api.call("POST", "/v1/invites", json={"labels": {"site": "north"}})
    assert invitation["command"] == f"skerry-agent enroll {invitation['token']}"
    csr, key = new_csr()
    with httpx.Client(base_url=running.run.url, verify=api.tls, trust_env=False) as stranger:
        joined = stranger.post(
            "/v1/enroll", json={"token": invitation["token"], "csr_pem": csr, "name": "cam-1"}
        ).json()
    assert joined["device"] == "cam-1"
    tls = TlsFiles(tmp_path / "ca.pem", tmp_path / "cert.pem", tmp_path / "key.pem")
    tls.ca.write_text(joined["ca_pem"])
    tls.cert.write_text(joined["cert_pem"])
    tls.key.write_bytes(key)
    bundle = small_bundle("1.0.0", model_bytes=700_000)
    api.publish(bundle, data)

    async def live() -> None:
        device = FakeDevice("cam-1", Mqtt(joined["mqtt_url"], "cam-1", tls=tls), joined["director_pem"].encode())
        task = asyncio.create_task(device.run())
        try:
            async with asyncio.timeout(30):
                await device.fresh.wait()
                call = api.call
                rollout = await asyncio.to_thread(
                    call, "POST", "/v1/rollouts", json={"skill": "tiny", "selector": "site=north", "canary": "1"}
                )
                while rollout["state"] == "running":
                    await asyncio.sleep(0.02)
                    rollout = await asyncio.to_thread(call, "GET", f"/v1/rollouts/{rollout['id']}")
                assert rollout["state"] == "done", rollout
                assert device.serves("tiny", "1.0.0")
                assert {part.wire_sha256 for part in bundle.bundle.parts} < set(device.objects)
                answer = await asyncio.to_thread(
                    api.http.post,
                    "/v1/devices/cam-1/infer",
                    params={"skill": "tiny"},
                    content=b'{"inputs":[]}\x01\x02',
                    headers={"Inference-Header-Content-Length": "13"},
                )
                assert (answer.status_code, answer.content) == (200, b'{"inputs":[]}\x01\x02')
                assert answer.headers["inference-header-content-length"] == "13"
                logs = await asyncio.to_thread(call, "GET", "/v1/devices/cam-1/logs")
                assert logs["lines"] == ["a line of the log"]
                removed = await asyncio.to_thread(call, "DELETE", "/v1/devices/cam-1")
                assert removed == {"removed": "cam-1"}
                while device.lost < 2:  # noqa: ASYNC110 - cut, and refused when it comes back
                    await asyncio.sleep(0.02)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(live())
    events = [event["kind"] for event in api.call("GET", "/v1/events")]
    assert events[0] == "device.removed"


def test_a_command_that_starts_a_controller_twice_gets_the_one_that_runs(tmp_path: Path) -> None:
    data = tmp_path / "data"
    first = supervise.start(settings(data, embedded_broker=True))
    try:
        second = supervise.start(settings(data))
        assert second.already
        assert second.run == first.run
        assert (data / "run.json").stat().st_mode & 0o777 == 0o600
    finally:
        assert supervise.stop(data)
    assert supervise.status(data) is None
    assert not supervise.stop(data)


def test_a_killed_controller_leaves_no_child_and_its_run_file_is_not_believed(tmp_path: Path) -> None:
    data = tmp_path / "data"
    running = supervise.start(settings(data))
    children = children_of(running.run.pid)
    assert children
    os.kill(running.run.pid, signal.SIGKILL)
    os.waitpid(running.run.pid, 0)
    assert wait_gone(children)
    assert (data / "run.json").exists()
    assert supervise.status(data) is None
    again = supervise.start(settings(data))
    assert (again.run.url, again.run.mqtt_url) == (running.run.url, running.run.mqtt_url)  # devices know these ports
    assert supervise.stop(data)


def test_a_stopped_controller_takes_its_children_along(tmp_path: Path) -> None:
    data = tmp_path / "data"
    running = supervise.start(settings(data))
    children = children_of(running.run.pid)
    assert supervise.stop(data)
    assert wait_gone(children)
    assert not (data / "run.json").exists()


def test_a_controller_is_stopped_when_its_process_is_gone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    code = (
        "import sys; from pathlib import Path; from cloud import supervise; from cloud.config import Settings\n"
        f"r = supervise.start(Settings(data=Path({str(data)!r}), api_port=0, mqtt_port=0, tail_port=0))\n"
        "print(r.run.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        begun = time.monotonic()
        assert supervise.stop(data)
        assert Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"  # its parent never looks
        assert time.monotonic() - begun < supervise.STOP_DEADLINE_S


def test_an_attached_controller_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    data = tmp_path / "data"
    code = (
        "import sys; from pathlib import Path; from cloud import supervise; from cloud.config import Settings\n"
        f"r = supervise.start(Settings(data=Path({str(data)!r}), api_port=0, mqtt_port=0, tail_port=0), detach=False)\n"
        "print(r.run.pid, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        children = children_of(pid)
        starter.kill()
    assert wait_gone([pid, *children])


def test_a_broker_that_dies_is_started_again_and_told_everything(tmp_path: Path, connect: Connect) -> None:
    data = tmp_path / "data"
    running = supervise.start(settings(data))
    try:
        api = connect(running)
        first = api.call("GET", "/v1/status")["broker"]["pid"]
        os.kill(first, signal.SIGKILL)
        end = time.monotonic() + 30
        while time.monotonic() < end:
            broker = api.call("GET", "/v1/status")["broker"]
            if broker["pid"] not in (None, first) and broker["connected"]:
                break
        assert broker["connected"]
        assert broker["pid"] != first
    finally:
        supervise.stop(data)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
@pytest.mark.parametrize("program", [["-c", "from cloud.cli import main; main()", "up", "--foreground"], CONTROLLER])
def test_ctrl_c_is_told_from_the_usual_end_of_a_service(
    program: list[str], number: signal.Signals, code: int, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    words = [sys.executable, "-P", *program, "--data", str(data)]
    for door in ("api", "mqtt", "tail"):
        words += [f"--{door}-port", "0"]
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as started:
        assert started.stdout is not None
        said = ""
        while "controller.ready" not in said:
            line = started.stdout.readline()
            assert line, said
            said += line
        started.send_signal(number)
        said, _ = started.communicate(timeout=30)
    assert started.returncode == code, said
    assert "Traceback" not in said
    assert supervise.status(data) is None


def test_an_occupied_port_is_one_sentence_and_exit_code_69(tmp_path: Path, free_port: int) -> None:
    with (
        socket.create_server(("127.0.0.1", free_port)),
        pytest.raises(Unreachable, match=f"127.0.0.1:{free_port}.*--api-port"),
    ):
        supervise.start(Settings(data=tmp_path / "data", api_port=free_port, mqtt_port=0, tail_port=0))
    assert not (tmp_path / "data" / "run.json").exists()


def test_a_dead_external_broker_is_one_sentence(tmp_path: Path, free_port: int) -> None:
    command = [
        sys.executable,
        "-m",
        "cloud.controller",
        "--data",
        str(tmp_path / "d"),
        "--api-port",
        "0",
        "--tail-port",
        "0",
    ]
    done = subprocess.run(
        [*command, "--broker", f"mqtts://127.0.0.1:{free_port}", "--broker-deadline", "1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 69
    assert "does not let the controller in" in done.stderr
    assert not (tmp_path / "d" / "ports.json").exists(), "a start that failed pins no port for the next one"
    assert "Traceback" not in done.stderr


def test_a_data_directory_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(SkerryError, match="cannot write"):
        supervise.start(settings(tmp_path / "data"))


def test_a_start_on_a_full_disk_says_so(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path / "data")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may make a small disk")
    try:
        with pytest.raises(StorageError, match="no space left to write"):
            supervise.start(settings(tmp_path / "data", embedded_broker=True))
    finally:
        subprocess.run(["umount", str(tmp_path / "data")], check=True)


def test_the_api_answers_every_error_in_one_shape(tmp_path: Path, connect: Connect) -> None:
    data = tmp_path / "data"
    api = connect(supervise.start(settings(data, embedded_broker=True)))
    try:
        for method, path, more, status, code in (
            ("GET", "/v1/nothing", {}, 404, 66),
            ("PATCH", "/v1/devices", {}, 405, 2),
            ("GET", "/v1/devices/none", {}, 404, 66),
            ("POST", "/v1/rollouts", {"json": {"skil": "x"}}, 422, 2),
            ("POST", "/v1/rollouts", {"content": b"{"}, 422, 2),
            ("POST", "/v1/rollouts", {"json": {"skill": "x", "selector": "all"}}, 404, 66),
            ("POST", "/v1/rollouts/7/resume", {}, 404, 66),
            ("POST", "/v1/rollouts/7/dance", {}, 400, 2),
            ("POST", "/v1/invites", {"json": {"labels": {"name": "x"}}}, 400, 2),
            ("POST", "/v1/enroll", {"json": {"token": "x", "csr_pem": "y"}}, 400, 65),
            ("POST", "/v1/enroll", {"json": {"token": "x", "csr_pem": "y", "capabilities": {}}}, 422, 2),
            ("POST", "/v1/invites", {"content": b" " * (3 << 20)}, 413, 65),
            ("PUT", "/v1/objects/xyz", {"content": b"a"}, 400, 65),
            ("PUT", f"/v1/objects/{'0' * 64}", {"content": b"a"}, 403, 77),
            ("GET", "/v1/repository/passwords", {}, 404, 66),
            ("GET", "/v1/status", {"headers": {"Authorization": "Bearer wrong"}}, 401, 77),
        ):
            answer = api.http.request(method, path, **more)
            assert answer.status_code == status, (path, answer.text)
            assert set(answer.json()) == {"error", "code"}, (path, answer.text)
            assert answer.json()["code"] == code, (path, answer.text)
        assert list((data / "objects").glob(".*")) == []
        assert "openapi" in api.call("GET", "/openapi.json")
        assert json.loads((data / "run.json").read_text())["pid"] == api.running.run.pid
    finally:
        supervise.stop(data)


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_gone(pids: list[int]) -> bool:
    """Say whether all of these processes end within ten seconds."""
    end = time.monotonic() + 10
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(pid)
            try:
                if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                    return False
            finally:
                os.close(descriptor)
    return True
