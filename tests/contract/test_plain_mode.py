"""Plain mode against strangers: NVIDIA's client asks our tail, and our link asks a real Triton that knows nothing of us.

Both run in an environment and processes of their own: made on first use (about 450 MB from the package index, a minute or
two), with pinned versions, and kept under SKERRY_ENVIRONMENTS (default ~/.cache/skerry/environments). Run by hand with
SKERRY_TRITON=1; docs/splitting.md holds the result.
"""

import contextlib
import hashlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cloud.split.measure import running_link, running_tail
from cloud.tail.store import install
from edge_agent.tail_client import LinkClient
from skills import ort
from skills.split_plan import Cut, Plan, load_plan, plan_hash

pytestmark = [
    pytest.mark.triton,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.environ.get("SKERRY_TRITON") != "1", reason="run by hand: SKERRY_TRITON=1"),
]
HERE = Path(__file__).parent / "triton"
PINNED = (
    "nvidia-pytriton==0.7.0", "tritonclient==2.73.0", "grpcio==1.85.1", "protobuf==6.33.6", "numpy==1.26.4",
    "onnxruntime==1.31.1", "pyzmq==27.3.0", "gevent==26.9.0", "geventhttpclient==2.6.1", "python-rapidjson==1.25",
)  # fmt: skip
START_S = 120.0


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of the environment; one that was not finished is made anew."""
    home = Path(pwd.getpwuid(os.getuid()).pw_dir)
    cache = Path(os.environ.get("SKERRY_ENVIRONMENTS", home / ".cache" / "skerry" / "environments"))
    folder = cache / f"triton-{hashlib.sha256(' '.join(PINNED).encode()).hexdigest()[:12]}"
    interpreter = folder / "bin" / "python"
    if not (folder / "done").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True, timeout=120)
        subprocess.run(
            [interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PINNED],
            check=True, timeout=800,
        )  # fmt: skip
        (folder / "done").touch()
    return interpreter


@pytest.fixture(scope="module")
def plan(planned_net: Any) -> Plan:
    return load_plan((planned_net.folder / "split.yaml").read_text())


def behind(planned: Any, plan: Plan, cut: Cut, count: int = 1) -> dict[str, np.ndarray]:
    """Return the tensors of a cut for the first `count` inputs."""
    chain = ort.chain([planned.folder / one.file for one in plan.segments], ["logits"])
    return chain.run({"x": planned.x[:count]}, 0, cut.after) if cut.after else {"x": planned.x[:count]}


def right(planned: Any, count: int = 1) -> np.ndarray:
    return ort.session(planned.model).run({"x": planned.x[:count]})["logits"]


def test_nvidias_client_finds_our_tail_healthy_reads_its_metadata_and_gets_right_answers(
    python: Path, planned_net: Any, plan: Plan, tmp_path: Path
) -> None:
    name = install(planned_net.folder, tmp_path / "tails")
    cut = next(one for one in plan.cuts if one.name.startswith("c"))

    def asks(model: str, arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        outputs, report = tmp_path / "out.npz", tmp_path / "report.json"
        outputs.unlink(missing_ok=True)
        np.savez(tmp_path / "in.npz", **arrays)
        command = [python, HERE / "client.py", f"127.0.0.1:{port}", model, tmp_path / "in.npz", outputs, report]
        subprocess.run(command, check=True, timeout=90, cwd=tmp_path)
        return json.loads(report.read_text()), dict(np.load(outputs)) if outputs.exists() else {}

    with running_tail(tmp_path / "tails", tmp_path) as port:
        for model, start in ((name, plan.cut("input")), (f"{name}.{cut.name}", cut)):
            said, found = asks(model, behind(planned_net, plan, start, 3))
            assert (said["live"], said["model_ready"], said["id"]) == (True, True, "7")
            assert said["server"]["name"] == "skerry-tail"
            assert {one["name"] for one in said["model"]["inputs"]} == set(behind(planned_net, plan, start))
            np.testing.assert_allclose(found["logits"], right(planned_net, 3), atol=1e-4)
        said, found = asks("0" * 16, {"x": planned_net.x[:1]})
        assert not said["model_ready"]
        assert said["refused"][0] == "StatusCode.NOT_FOUND"
        assert "lies here" in said["refused"][1]
        assert not found
        said, found = asks(name, {"x": planned_net.x[:1, :, :3]})
        assert said["refused"][0] == "StatusCode.INVALID_ARGUMENT"
        assert "the plan says FP32" in said["refused"][1]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def stock_server(python: Path, planned: Any, plan: Plan, folder: Path) -> Iterator[int]:
    """Run a Triton whose models are the tails of a plan, each under the name that plain mode gives it."""

    def described(tensors: Any) -> list[list[Any]]:
        return [[live.name, live.dtype, list(live.shape)] for live in tensors]

    models = {
        plan_hash(plan) if cut.name == "input" else f"{plan_hash(plan)}.{cut.name}": {
            "files": [str(planned.folder / one.file) for one in plan.segments[cut.after :]],
            "inputs": described(cut.tensors if cut.after else plan.inputs),
            "outputs": described(plan.outputs),
        }
        for cut in plan.cuts
        if cut.name != "local"
    }
    (folder / "models.json").write_text(json.dumps(models))
    port, said = free_port(), folder / "triton.log"
    with said.open("wb") as log:
        child = subprocess.Popen(
            [python, HERE / "serve.py", folder / "models.json", str(port), folder / "triton"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip
    try:
        _await_ready(child, port, list(models), said)
        yield port
    finally:
        child.terminate()
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _await_ready(child: "subprocess.Popen[bytes]", port: int, models: list[str], said: Path) -> None:
    import grpc

    from skills import oip

    until = time.monotonic() + START_S
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub, pb = oip.service().GRPCInferenceServiceStub(channel), oip.messages()
        while child.poll() is None and time.monotonic() < until:
            with contextlib.suppress(grpc.RpcError, subprocess.TimeoutExpired):
                if all(stub.ModelReady(pb.ModelReadyRequest(name=name), timeout=5).ready for name in models):
                    return
                child.wait(0.3)
    pytest.fail(f"Triton did not start: {said.read_text()[-2000:]}")


def test_our_link_gets_right_answers_from_a_real_triton_and_finds_it_alive(
    python: Path, planned_net: Any, plan: Plan, tmp_path: Path
) -> None:
    with stock_server(python, planned_net, plan, tmp_path) as port, running_link(tmp_path / "l", port):
        client = LinkClient(tmp_path / "l")
        assert client.wait_up(20)
        for cut in plan.cuts:
            if cut.name == "local":
                continue
            arrays = behind(planned_net, plan, cut)
            for _ in range(3):
                reply = client.wait(client.send_plain(plan_hash(plan), cut.name, arrays, 10.0), 10.0)
                assert reply is not None
                assert reply.outputs is not None, reply.error
                np.testing.assert_allclose(reply.outputs["logits"], right(planned_net), atol=1e-4)
        unknown = client.wait(client.send_plain("0" * 16, "c1", arrays, 10.0), 10.0)
        assert unknown is not None
        assert unknown.outputs is None
        assert unknown.kind in ("invalid", "unavailable")
        assert unknown.error
        compact = client.wait(client.send(plan_hash(plan), "c1", "u8", b"frame", 10.0), 10.0)
        assert compact is not None
        assert compact.outputs is None  # a stock server knows no frames, and says so
        assert compact.error
        client.close()
