"""How a command ends: one sentence, the documented code, no traceback unless asked for."""

import errno
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import pytest

from cloud import cli, client
from cloud.access import Access
from cloud.cli import fleet, host, run
from cloud.views import RolloutView
from skills.errors import Refused

SKERRY = [sys.executable, "-P", "-c", "from cloud.cli import main; main()"]


def ends(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = run(list(arguments))
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["bogus"], 2, "no such command 'bogus'"),
        (["push"], 2, "missing argument 'SKILL[@VERSION]'"),
        (["push", "digits", "--too", "all"], 2, "no such option: --too"),
        (["push", "digits@", "--to", "all"], 2, "SKILL@VERSION"),
        (["devices"], 66, "no controller is known"),
        (["login", "nowhere"], 2, "expected https://HOST:PORT"),
        (["skill", "check", "absent"], 66, "absent is not a folder"),
        (["skill", "build", "absent", "-o", "x.skb"], 66, "absent is not a folder"),
        (["skill", "publish", "home"], 65, "home is a folder: build it first (skerry skill build home -o home.skb)"),
        (["skill", "new", "Bad Name"], 2, "cannot be called"),
        (["compress", "absent.onnx", "--data", "absent.npz", "-o", "out"], 66, "absent"),
        (
            ["compress", "absent.onnx", "--data", "absent.npz", "-o", "out", "--goal", "fame"],
            2,
            "expected size, latency or both",
        ),
        (["split", "absent.onnx", "--data", "absent.npz", "-o", "out"], 66, "absent"),
        (["split", "m.onnx", "--data", "d.npz", "-o", "out", "--link", "fast"], 2, "20mbit/30ms"),
        (["up", "--listen", "no.such.host.invalid"], 2, "not known here"),
    ],
)
def test_bad_input_is_one_sentence_with_its_code(
    arguments: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found, text = ends(capsys, *arguments)
    assert (found, text.startswith("skerry: ")) == (code, True)
    assert said in text
    assert text.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def failing(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Refused("the canary failed"), 79, "the canary failed"),
        (OSError(errno.ENOSPC, "No space left on device", "/full"), 74, "/full: No space left on device"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 78, "pip install 'skerry[compress]'"),
        (
            ModuleNotFoundError("No module named 'sqlalchemy.orm'", name="sqlalchemy.orm"),
            78,
            "pip install 'skerry[cloud]'",
        ),
        (ZeroDivisionError("oh"), 1, "unexpected ZeroDivisionError"),
        (BrokenPipeError(), 0, ""),
    ],
)
def test_whatever_happens_inside_a_command_ends_in_order(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fleet, "connect", failing(error))
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    found, text = ends(capsys, "devices")
    assert found == code
    assert said in text
    assert "Traceback" not in text


class Endless:
    """A controller whose rollout never ends, and a person who presses Ctrl-C at the first look."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def push(self, *_: object) -> RolloutView:
        return RolloutView(4, "digits", "1.0.0", "push", "all", 1, "running", False, "", 0.0, {})

    def rollout(self, _number: int) -> RolloutView:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the interrupt comes first")


def test_an_interrupted_wait_says_that_the_rollout_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fleet, "connect", lambda *_: Endless())
    found, text = ends(capsys, "push", "digits", "--to", "all", "--wait")
    assert found == 130
    assert "the rollout 4 goes on" in text
    assert "skerry rollouts abort 4" in text


class Typist(io.StringIO):
    """A terminal at which somebody types."""

    def isatty(self) -> bool:
        return True


def test_a_fingerprint_that_is_not_confirmed_is_a_refusal_and_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "fetch_ca", lambda _url: b"certificate")
    monkeypatch.setattr(host, "certificate_fingerprint", lambda _pem: "4f2a")
    monkeypatch.setattr(sys, "stdin", Typist("n\n"))
    assert run(["login", "https://192.0.2.1:8443", "--token", "t"]) == 79
    asked = capsys.readouterr()
    assert "skerry status on its own machine" in asked.out
    assert "fingerprint that https://192.0.2.1:8443 shows was not confirmed" in asked.err
    assert not list(tmp_path.rglob("ca.pem"))


class Calm:
    """A controller that is well."""

    def __init__(self, ca: Path) -> None:
        self.access = Access("https://here:8443", "t", str(ca))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def status(self) -> dict[str, Any]:
        return {
            "url": "https://here:8443", "version": "1", "pid": 1, "releases": 0, "rollouts": {"open": 0}, "data": "d",
            "broker": {"url": "b", "kind": "amqtt", "connected": True}, "tail": {"url": "t", "pid": 2},
            "devices": {"online": 0, "enrolled": 0}, "log": "l",
        }  # fmt: skip


def test_the_status_prints_the_fingerprint_to_compare_at_a_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ca.pem").write_bytes(b"certificate")
    monkeypatch.setattr(host, "connect", lambda *_: Calm(tmp_path / "ca.pem"))
    monkeypatch.setattr(host, "certificate_fingerprint", lambda pem: f"sha256-of-{pem.decode()}")
    assert run(["status"]) == 0
    assert "sha256-of-certificate" in capsys.readouterr().out
    assert run(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == "sha256-of-certificate"


def test_debug_shows_where_it_happened(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fleet, "connect", failing(ZeroDivisionError("oh")))
    found, text = ends(capsys, "devices", "--debug")
    assert found == 1
    assert "Traceback" in text


def test_help_and_version_load_nothing_heavy() -> None:
    heavy = {
        "torch",
        "onnx",
        "onnxruntime",
        "numpy",
        "fastapi",
        "sqlalchemy",
        "httpx",
        "grpc",
        "tuf",
        "pydantic",
        "PIL",
        "compress",
    }
    code = f"import sys; from cloud.cli import run; assert not run(['--help']); assert not {heavy} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "skerry demo" in done.stdout


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -P -c 'from cloud.cli import main; main()' --help | head -1"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
