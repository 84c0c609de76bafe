"""The real agent with real workers: a zygote, forked workers, a real ONNX model, the local endpoint, a real controller."""

import asyncio
import base64
import contextlib
import dataclasses
import datetime as dt
import json
import os
import select
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cloud import supervise
from cloud.config import Settings
from edge_agent.workers import Load, ZygoteWorkers
from skills import oip, ort, signing
from skills.bundle import build_bundle, open_bundle
from skills.desired import ObjectRef
from skills.errors import DeadlineExceeded, FormatError, SkerryError, Unreachable
from skills.split_plan import load_plan
from skills.wire import encode_yaml

SKILL = """\
name: {name}
version: {version}
inputs: [{{name: x, dtype: FP32, shape: [-1, 4]}}]
outputs: [{{name: y, dtype: FP32, shape: [-1, 4]}}, {{name: confidence, dtype: FP32, shape: [-1]}}]
models:
  net:
    variants:
      - {{name: plain, runtime: onnxruntime, file: models/net.onnx, ram_mb: 8}}
stages: [{{name: twice, model: net, code: twice.py}}]
"""
CODE = """\
import numpy as np

def twice(inputs, model):
    if inputs["x"].size and inputs["x"].flat[0] == -666:
        import os
        print("about to fall over", flush=True)
        os.abort()
    y = model(x=inputs["x"])["y"]
    return {"y": y, "confidence": np.full(len(y), 0.5, np.float32)}
"""


@pytest.fixture
def tiny_skill(tmp_path: Path) -> Callable[..., Path]:
    """Write the folder of a real skill whose ONNX model multiplies by `factor`; the probe expects `golden`."""

    def write(version: str = "1.0.0", *, factor: float = 2.0, golden: float | None = None, code: str = CODE) -> Path:
        import numpy as np
        import onnx
        from onnx import TensorProto, helper

        folder = tmp_path / f"tiny-{version}"
        (folder / "models").mkdir(parents=True)
        node = helper.make_node("Mul", ["x", "k"], ["y"])
        graph = helper.make_graph(
            [node],
            "tiny",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
            [helper.make_tensor("k", TensorProto.FLOAT, [1], [factor])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.save(model, folder / "models/net.onnx")
        (folder / "twice.py").write_text(code)
        (folder / "skill.yaml").write_text(SKILL.format(name="tiny", version=version))
        x = np.arange(8, dtype=np.float32).reshape(2, 4)
        np.savez(folder / "probe.npz", **{"in.x": x, "out.y": x * (factor if golden is None else golden)})
        return folder

    return write


class Board:
    """One agent process with a data directory of its own."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.process: subprocess.Popen[str] | None = None
        self.port, self.token = 0, ""
        data.mkdir(exist_ok=True)
        (data / "agent.yaml").write_text("listen: 127.0.0.1:0\ntrial_s: 20\n")

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edge_agent", *arguments, "--data", str(self.data)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    def start(self) -> None:
        command = [sys.executable, "-m", "edge_agent", "run", "--data", str(self.data)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "skills at http://" in line:
                self.port = int(line.split(":")[-1].split("/")[0])
                return
        raise AssertionError(f"the agent ended: {(self.data / 'agent.log').read_text()[-2000:]}")

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(how)
        code = self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process = None
        return code

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return json.load(answer)

    def ask(self, x: list[list[float]]) -> Any:
        tensor = {"name": "x", "datatype": "FP32", "shape": [len(x), 4], "data": x}
        body = json.dumps({"id": "7", "inputs": [tensor]}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/v2/models/tiny/infer", body)
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - http, just above
            return json.load(answer)


# --- workers and the local endpoint, without a controller -------------------------------------------------------------------


def load_of(folder: Path, tmp_path: Path, version: str = "1.0.0", timer: str = "local") -> Load:
    build_bundle(folder, tmp_path / f"{version}.skb")
    file = open_bundle(tmp_path / f"{version}.skb")
    manifest = tmp_path / f"{version}.json"
    manifest.write_bytes(file.manifest_bytes)
    return Load("tiny", version, file.digest, folder, manifest, {"net": "plain"}, timer, 250)


def question(x: Any, **more: Any) -> tuple[dict[str, object], bytes]:
    body, size = oip.encode_call(oip.Call({"x": x}, **more))
    return {"op": "infer", "json_len": size}, body


async def test_a_worker_loads_probes_and_answers_and_costs_little_beyond_the_zygote(tiny_skill, tmp_path):
    import numpy as np

    workers = ZygoteWorkers(("onnxruntime",))
    try:
        worker = await workers.start(load_of(tiny_skill(), tmp_path), lambda _: None)
        assert (await worker.call({"op": "probe"}, b"", 30))[0]["probe"] == ""
        x = np.array([[1, 2, 3, 4]], np.float32)
        header, body = await worker.call(*question(x, id="a"), 30)
        answer = oip.decode_answer(body, header["json_len"])
        assert answer.id == "a"
        assert answer.arrays["y"].tolist() == [[2, 4, 6, 8]]
        assert header["confidence"] == 0.5
        with pytest.raises(FormatError, match="takes FP32"):
            await worker.call(*question(x.astype(np.float64)), 30)
        with pytest.raises(FormatError, match=r"\[1, 3\]"):
            await worker.call(*question(x[:, :3]), 30)
        with pytest.raises(FormatError):
            await worker.call({"op": "infer", "json_len": 2}, b"{}", 30)
        await worker.stop(1)
    finally:
        await workers.stop()


async def test_a_worker_that_crashes_says_how_and_what_it_wrote_last(tiny_skill, tmp_path):
    import numpy as np

    workers, died = ZygoteWorkers(("onnxruntime",)), asyncio.Event()
    try:
        worker = await workers.start(load_of(tiny_skill(), tmp_path), lambda _: died.set())
        poison = np.full((1, 4), -666, np.float32)
        with pytest.raises(Unreachable, match="SIGABRT"):
            await worker.call(*question(poison), 30)
        async with asyncio.timeout(10):
            await died.wait()
        assert "about to fall over" in worker.last_words()
        again = await workers.start(worker.load, lambda _: None)
        assert (await again.call({"op": "probe"}, b"", 30))[0]["probe"] == ""
    finally:
        await workers.stop()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (
            "def twice(inputs, model):\n    raise RuntimeError('sensor unplugged')\n",
            "RuntimeError: sensor unplugged \\(twice.py line 2\\)",
        ),
        ("import no_such_thing\n", "ModuleNotFoundError"),
        ("x = 1\n", "has no function 'twice'"),
        ("def twice(:\n", "twice.py line 1: invalid syntax"),
    ],
)
async def test_bad_control_code_is_one_sentence_and_no_dead_agent(tiny_skill, tmp_path, code, reason):
    workers = ZygoteWorkers(("onnxruntime",))
    try:

        async def try_it() -> None:
            worker = await workers.start(load_of(tiny_skill(code=code), tmp_path), lambda _: None)
            await worker.call({"op": "probe"}, b"", 30)

        with pytest.raises(SkerryError, match=reason):
            await try_it()
    finally:
        await workers.stop()


async def test_a_mis_quantized_model_is_told_apart_by_its_probe(tiny_skill, tmp_path):
    workers = ZygoteWorkers(("onnxruntime",))
    try:
        worker = await workers.start(load_of(tiny_skill(factor=2.5, golden=2.0), tmp_path), lambda _: None)
        reply, _ = await worker.call({"op": "probe"}, b"", 30)
        assert "output 'y' is off by 3.5" in reply["probe"]
    finally:
        await workers.stop()


async def test_a_worker_that_is_too_slow_meets_the_deadline_and_goes_on(tiny_skill, tmp_path):
    import numpy as np

    code = CODE.replace("    y = ", "    import time\n    time.sleep(0.5)\n    y = ")
    workers = ZygoteWorkers(("onnxruntime",))
    try:
        worker = await workers.start(load_of(tiny_skill(code=code), tmp_path), lambda _: None)
        x = np.ones((1, 4), np.float32)
        with pytest.raises(DeadlineExceeded):
            await worker.call(*question(x), 0.1)
        _, body = await worker.call(*question(x, id="second"), 30)
        assert b"second" in body
    finally:
        await workers.stop()


async def test_a_worker_that_hangs_is_killed(tiny_skill, tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setattr("edge_agent.workers.HANG_S", 0.2)
    code = CODE.replace("    y = ", "    while True:\n        pass\n    y = ")
    workers, died = ZygoteWorkers(("onnxruntime",)), asyncio.Event()
    try:
        worker = await workers.start(load_of(tiny_skill(code=code), tmp_path), lambda _: died.set())
        with pytest.raises(DeadlineExceeded):
            await worker.call(*question(np.ones((1, 4), np.float32)), 0.1)
        async with asyncio.timeout(10):
            await died.wait()
        assert "SIGKILL" in str(worker.dead)
    finally:
        await workers.stop()


def test_workers_die_with_the_supervisor_even_when_it_is_killed(tiny_skill, tmp_path):
    load = load_of(tiny_skill(), tmp_path)
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from edge_agent.workers import Load, ZygoteWorkers\n"
        "async def main():\n"
        "    workers = ZygoteWorkers(('onnxruntime',))\n"
        "    folder, manifest = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "    load = Load('tiny', '1.0.0', 'd', folder, manifest, {'net': 'plain'}, 'local', 250)\n"
        "    worker = await workers.start(load, lambda _: None)\n"
        "    print(workers.pid, worker.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script, str(load.folder), str(load.manifest)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        handles = [os.pidfd_open(pid) for pid in pids]
        process.kill()
    for handle in handles:
        ready, _, _ = select.select([handle], [], [], 10)
        assert ready, "a child outlived the supervisor"
        os.close(handle)


# --- the whole agent with a real controller ----------------------------------------------------------------------------------


@pytest.fixture
def controller(tmp_path: Path) -> Iterator["Fleet"]:
    fleet = Fleet(tmp_path / "controller")
    yield fleet
    fleet.close()


class Fleet:
    """A real controller process and its API."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.running = supervise.start(Settings(data=data, api_port=0, mqtt_port=0, tail_port=0))
        headers = {"Authorization": f"Bearer {self.running.token}"}
        tls = ssl.create_default_context(cafile=str(self.running.ca))
        self.http = httpx.Client(
            base_url=self.running.run.url, headers=headers, verify=tls, timeout=20, trust_env=False
        )

    def call(self, method: str, path: str, **more: Any) -> Any:
        response = self.http.request(method, path, **more)
        assert response.status_code == 200, response.text
        return response.json()

    def release(self, folder: Path) -> str:
        build_bundle(folder, self.data / "made.skb")
        file = open_bundle(self.data / "made.skb")
        for sha256, content in {**file.objects, file.digest: file.manifest_bytes}.items():
            self.call("PUT", f"/v1/objects/{sha256}", content=content)
        key = signing.load_key(self.data / "keys" / "publisher.pem")
        ref = ObjectRef(file.digest, len(file.manifest_bytes))
        current = self.http.get("/v1/repository/targets").content
        target = signing.release_target(file.bundle.skill.name, file.bundle.skill.version)
        targets = signing.add_release(current, target, ref, key, dt.datetime.now(dt.UTC)).decode()
        self.call("POST", "/v1/releases", json={"manifest_sha256": file.digest, "targets_json": targets})
        return file.digest

    def push(self, version: str, stage: str, skill: str = "tiny") -> dict[str, Any]:
        """Roll a version out and wait for its device to come to a stage; the API is slow enough not to spin."""
        order = {"skill": skill, "version": version, "selector": "all", "canary": None}
        number = self.call("POST", "/v1/rollouts", json=order)["id"]
        return self.until(number, stage)

    def until(self, number: int, stage: str) -> dict[str, Any]:
        end = time.monotonic() + 40
        while time.monotonic() < end:
            (member,) = self.call("GET", f"/v1/rollouts/{number}")["devices"]
            if member["stage"] == stage:
                return dict(member)
            time.sleep(0.05)
        raise AssertionError(f"rollout {number} did not come to {stage}: {member}")

    def until_online(self, wanted: bool) -> None:
        """Wait for the only device to be shown as connected, or as gone, at once: far below the broker's keepalive."""
        end = time.monotonic() + 8
        while self.call("GET", "/v1/devices")[0]["online"] is not wanted:
            assert time.monotonic() < end

    def close(self) -> None:
        self.http.close()
        supervise.stop(self.data)


@pytest.fixture
def board(controller: Fleet, tmp_path: Path) -> Iterator[Board]:
    """An enrolled device, off."""
    made = Board(tmp_path / "board")
    token = controller.call("POST", "/v1/invites", json={"labels": {}})["token"]
    made.token = token
    joined = made.call("enroll", token, "--name", "cam-1", "--json")
    assert joined.returncode == 0, joined.stderr
    assert json.loads(joined.stdout)["device"] == "cam-1"
    yield made
    if made.process is not None:
        made.stop(signal.SIGKILL)


def test_a_device_joins_only_the_controller_that_invited_it_and_only_once(controller, tmp_path):
    token = controller.call("POST", "/v1/invites", json={"labels": {}})["token"]
    said = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))

    def changed(**more: str) -> str:
        return base64.urlsafe_b64encode(json.dumps({**said, **more}).encode()).decode()

    cases = [
        (changed(f="0" * 64), 77, "its CA is another one"),
        (changed(s="x"), 77, "invitation"),
        (changed(u="https://127.0.0.1:9"), 69, "does not answer"),
        (changed(u="http://127.0.0.1:9"), 2, "expected https://HOST:PORT"),
        (token[: len(token) // 2], 2, "all of it"),
    ]
    board = Board(tmp_path / "board")
    for wrong, code, words in cases:
        done = board.call("enroll", wrong)
        assert (done.returncode, words in done.stderr) == (code, True), done.stderr
        assert not (board.data / "identity/device.json").exists()
        assert "Traceback" not in done.stderr
    key = (board.data / "identity/key.pem").read_bytes()
    assert board.call("enroll", token).returncode == 0
    assert (board.data / "identity/key.pem").read_bytes() == key
    assert Board(tmp_path / "other").call("enroll", token).returncode == 77
    assert board.call("doctor").returncode == 0


def test_a_real_device_takes_releases_answers_refuses_returns_and_boots_offline(controller, board, tiny_skill):
    again = board.call("enroll", board.token)
    assert (again.returncode, "has an identity already" in again.stderr) == (79, True)
    board.start()
    second = board.call("run")
    assert (second.returncode, "another agent runs" in second.stderr) == (79, True)

    controller.release(tiny_skill("1.0.0", factor=2.0))
    assert controller.push("1.0.0", "serving")["variants"] == {"net": "plain"}
    answer = board.ask([[1, 2, 3, 4]])
    assert answer["id"] == "7"
    assert answer["outputs"][0]["data"] == [2, 4, 6, 8]

    controller.release(tiny_skill("2.0.0", factor=2.5, golden=3.0))  # really mis-quantized, rightly signed
    assert "probe failed: output 'y' is off by 3.5" in controller.push("2.0.0", "failed")["reason"]
    assert board.ask([[1, 2, 3, 4]])["model_version"] == "1.0.0"

    controller.release(tiny_skill("3.0.0", factor=3.0, golden=3.0))
    controller.push("3.0.0", "serving")
    for _ in range(3):
        with contextlib.suppress(urllib.error.HTTPError):
            board.ask([[-666, 0, 0, 0]])
    end = time.monotonic() + 30
    while board.ask([[1, 2, 3, 4]])["model_version"] != "1.0.0":
        assert time.monotonic() < end
    (state,) = [entry for entry in board.get("/status")["skills"] if entry["version"] == "3.0.0"]
    assert state["phase"] == "failed"
    assert "died 3 times within its trial" in state["reason"]
    assert "about to fall over" in state["reason"]

    status = json.loads(board.call("status", "--json").stdout)
    assert status["running"] is True
    assert status["connected"] is True
    assert 0 < status["pss_kb"] < 28_000  # the goal is 25 MB; what the machine shares moves it by a little

    assert board.stop() == 0
    controller.until_online(False)  # it said so itself: a broker tells only of those who vanish
    board.start()
    controller.until_online(True)

    assert board.stop(signal.SIGKILL) == -9
    supervise.stop(controller.data)
    start = time.monotonic()
    board.start()
    assert board.ask([[1, 2, 3, 4]])["model_version"] == "1.0.0"
    assert time.monotonic() - start < 10
    assert board.stop(signal.SIGINT) == 130
    assert "Traceback" not in (board.data / "agent.log").read_text()
    assert json.loads(board.call("status", "--json").stdout)["running"] is False


SPLIT_SKILL = """\
name: halves
version: 1.0.0
inputs: [{name: x, dtype: FP32, shape: [-1, 1, 12, 12]}]
outputs: [{name: logits, dtype: FP32, shape: [-1, 4]}]
models: {net: {variants: [{name: split, runtime: onnxruntime, split: models/split/split.yaml, ram_mb: 16}]}}
stages: [{name: look, model: net, code: look.py}]
probe: {tolerance: 0.001}
"""


def test_a_split_skill_is_probed_here_answered_together_with_the_tail_and_alone_without_it(
    controller, board, planned_net, tmp_path
):
    import numpy as np

    folder = tmp_path / "halves"
    shutil.copytree(planned_net.folder, folder / "models/split")
    plan_file = folder / "models/split/split.yaml"
    plan = load_plan(plan_file.read_text(), "the plan")
    cut = next(c.name for c in plan.cuts if c.name.startswith("c") and any(one.admitted for one in c.codings))
    plan_file.write_text(encode_yaml(dataclasses.replace(plan, policy=dataclasses.replace(plan.policy, pin=cut))))
    (folder / "skill.yaml").write_text(SPLIT_SKILL)
    (folder / "look.py").write_text("def look(inputs, model):\n    return model(x=inputs['x'])\n")
    x = planned_net.x[:1].astype(np.float32)
    whole = ort.session(planned_net.model).run({"x": x})["logits"]
    np.savez(folder / "probe.npz", **{"in.x": x, "out.logits": whole})
    (board.data / "agent.yaml").write_text("listen: 127.0.0.1:0\ntail_deadline_ms: 2000\ntimer: dilated(10)\n")
    board.start()
    controller.release(folder)
    controller.push("1.0.0", "serving", skill="halves")

    def ask() -> str:
        body, size = oip.encode_call(oip.Call({"x": x}))
        url = f"http://127.0.0.1:{board.port}/v2/models/halves/infer"
        request = urllib.request.Request(url, body, {"Inference-Header-Content-Length": str(size)})
        with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310 - http, just above
            head = reply.headers["Inference-Header-Content-Length"]
            answer = oip.decode_answer(reply.read(), int(head))
        assert np.argmax(answer.arrays["logits"]) == np.argmax(whole)
        records = (board.data / "usage/usage.jsonl").read_text().splitlines()
        return str(json.loads(records[-1])["where"])

    until = time.monotonic() + 60
    while ask() != "split":
        assert time.monotonic() < until, "the tail never answered"
    supervise.stop(controller.data)  # the tail and the broker are gone
    assert {ask() for _ in range(10)} <= {"local", "continued"}
    log = (board.data / "agent.log").read_text()
    assert "link.started" in log
    assert board.stop() == 0
