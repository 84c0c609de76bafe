"""Small parts of the agent: settings, capabilities, usage records, logs, tokens, golden outputs, the command line."""

import argparse
import itertools
import json
import logging
import re
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cloud.authority import Authority
from edge_agent import capabilities, enroll, logs
from edge_agent.__main__ import main, parser
from edge_agent.config import AgentConfig, load_config
from edge_agent.doctor import diagnose
from edge_agent.identity import Controller, IdentityFiles, load_identity
from edge_agent.probe import differs
from edge_agent.usage import UsageLog, UsageRecord
from edge_agent.workers import how_it_ended
from skills.errors import FormatError, NotFound, NotReached, SkerryError, UsageError
from skills.isa import isa
from skills.manifest import Probe
from skills.wire import encode_json

# --- settings ---------------------------------------------------------------------------------------


def test_an_absent_agent_yaml_means_the_defaults_and_a_named_one_must_exist(tmp_path):
    assert load_config(None, tmp_path) == AgentConfig()
    with pytest.raises(NotFound):
        load_config(tmp_path / "mine.yaml", tmp_path)


def test_a_misspelt_key_names_the_line_and_the_nearest_right_key(tmp_path):
    (tmp_path / "agent.yaml").write_text("# mine\nmemory_mb: 64\nruntmes: [litert]\n")
    with pytest.raises(FormatError, match=r"agent.yaml line 3: unknown key 'runtmes', did you mean 'runtimes'"):
        load_config(None, tmp_path)


@pytest.mark.parametrize(
    "text",
    ["listen: 0.0.0.0:80", "listen: 127.0.0.1:99999", "timer: slow", "runtimes: [tensorrt]", "memory_mb: 0", "- 1", "",
     "tail_url: https://triton:8001", "tail_url: triton:8001", "tail_url: grpcs://triton", "tail_url: grpcs://triton:0",
     "tail_url: grpcs://tri/ton:1", "tail_ca: ca.pem", "{tail_url: 'grpc://triton:8001', tail_ca: ca.pem}"],
)  # fmt: skip
def test_a_value_out_of_its_limits_is_refused(tmp_path, text):
    (tmp_path / "agent.yaml").write_text(text)
    with pytest.raises(FormatError):
        load_config(None, tmp_path)


def test_a_tail_of_ones_own_is_an_address_and_maybe_a_ca(tmp_path):
    for text in ("tail_url: grpc://10.0.0.7:8001", "tail_url: grpcs://[fd00::7]:8001", "{tail_url: '', tail_ca: ''}",
                 "{tail_url: 'grpcs://triton.example:8001', tail_ca: /etc/triton/ca.pem}"):  # fmt: skip
        (tmp_path / "agent.yaml").write_text(text)
        assert load_config(None, tmp_path).tail_url in text


# --- what the device can do --------------------------------------------------------------------------


@pytest.fixture
def fake_board(tmp_path: Path) -> Path:
    """The roots of an i.MX93 with an Ethos-U, 1 GiB and a Cortex-A55."""
    for folder in ("proc", "dev", "usr/lib"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd asimddp crc32\nCPU part\t: 0xd05\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal:        1013824 kB\n")
    (tmp_path / "dev/ethosu0").touch()
    return tmp_path


def test_capabilities_are_read_below_an_injectable_root(fake_board):
    found = capabilities.capabilities(AgentConfig(memory_mb=4096), fake_board)
    assert found.isa == ("asimd", "asimddp")
    assert found.ram_mb == 990
    assert found.npu == ()


def test_an_accelerator_counts_only_with_its_node_and_its_library_and_its_placement_is_unproven(fake_board, tmp_path):
    assert capabilities.accelerators(fake_board)[0].state == "no library (/dev/ethosu0 is there)"
    (fake_board / "usr/lib/libethosu.so").touch()
    found = capabilities.capabilities(AgentConfig(), fake_board)
    assert found.npu == ("ethosu",)
    findings = diagnose(AgentConfig(), tmp_path, fake_board).findings
    assert any(f.what == "accelerator" and "placement unproven" in f.text for f in findings)


def test_the_owner_caps_memory_and_runtimes(fake_board):
    found = capabilities.capabilities(AgentConfig(memory_mb=32, runtimes=("litert",)), fake_board)
    assert found.ram_mb == 32
    assert set(found.runtimes) <= {"litert"}


def test_a_board_without_proc_still_reports(tmp_path):
    assert isa(tmp_path) == ()
    assert capabilities.memory_mb(tmp_path) > 0


# --- records and logs ---------------------------------------------------------------------------------


def record(number: int) -> UsageRecord:
    return UsageRecord(float(number), "s", "1.0.0", "a" * 64, {"m": "v"}, "local", "local", 1.23456, 0.5)


def test_usage_takes_at_most_two_files_and_keeps_the_newest(tmp_path):
    tmp_path /= "usage"
    log = UsageLog(tmp_path, max_file_bytes=2000)
    for number in range(100):
        log.add(record(number))
    log.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    assert all(path.stat().st_size <= 2000 for path in files)
    newest = (tmp_path / "usage.jsonl").read_text().splitlines()[-1]
    assert json.loads(newest)["time"] == 99
    assert json.loads(newest)["ms"] == 1.235


def test_a_full_disk_loses_records_and_counts_them(tmp_path):
    (tmp_path / "usage").write_text("a file where a folder should be")
    log = UsageLog(tmp_path / "usage")
    log.add(record(1))
    assert (log.answers, log.lost) == (1, 1)


def test_the_end_of_the_log_is_bounded_in_lines_and_bytes(tmp_path, monkeypatch):
    (tmp_path / "agent.log.1").write_text("old\n" * 3)
    (tmp_path / "agent.log").write_text("".join(f"line {n}\n" for n in range(5)))
    assert logs.last_lines(tmp_path, 2) == b"line 3\nline 4\n"
    assert logs.last_lines(tmp_path, 7) == b"old\nold\n" + b"".join(b"line %d\n" % n for n in range(5))
    monkeypatch.setattr(logs, "MAX_TAIL_BYTES", 10)
    assert logs.last_lines(tmp_path, 100) == b"line 4\n"
    assert logs.last_lines(tmp_path / "nowhere", 5) == b""


def test_the_log_rotates_and_a_refusing_disk_does_not_raise(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "MAX_FILE_BYTES", 500)
    logger = logging.getLogger("skerry")
    before = list(logger.handlers)
    try:
        logs.start_logging(tmp_path, "info", console=False)
        for number in range(100):
            logger.info("event number=%s", number)
        assert sum(path.stat().st_size for path in tmp_path.glob("agent.log*")) < 2500
    finally:
        for handler in [h for h in logger.handlers if h not in before]:
            handler.close()
            logger.removeHandler(handler)
        logger.propagate = True


# --- joining -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", ["", "x", "e30", "eyJ1IjoiaHR0cHM6Ly9hIn0", "é", "a" * 5000])
def test_what_is_no_whole_invitation_says_so(token):
    with pytest.raises(UsageError, match="skerry devices invite"):
        enroll.read_token(token)


def test_a_key_is_made_once_and_stays_private(tmp_path):
    path = tmp_path / "key.pem"
    pem = enroll._own_key(path)
    assert enroll._own_key(path) == pem
    assert path.stat().st_mode & 0o077 == 0
    assert "CERTIFICATE REQUEST" in enroll.request_pem(pem, "cam-1")


def test_a_device_without_identity_says_how_to_get_one(tmp_path):
    with pytest.raises(NotFound, match="skerry devices invite"):
        load_identity(tmp_path)
    (tmp_path / "identity").mkdir()
    (tmp_path / "identity/device.json").write_bytes(encode_json(Controller("d", "https://c", "mqtts://c:1")))
    with pytest.raises(NotFound, match=r"lacks .*key.pem"):
        load_identity(tmp_path)


# --- golden outputs -------------------------------------------------------------------------------------

PROBE = Probe(tolerance=0.01, agreement=0.9)
F = np.float32


@pytest.mark.parametrize(
    ("found", "expected", "words"),
    [
        (np.array([1.0], F), np.array([1.005], F), ""),
        (np.array([1.0], F), np.array([1.5], F), "off by 0.5"),
        (np.array([np.nan], F), np.array([1.0], F), "off by nan"),
        (np.array([[1.0]], F), np.array([1.0], F), "has the shape [1, 1], the golden one [1]"),
        (np.array([1] * 9 + [2]), np.array([1] * 10), ""),
        (np.array([1] * 8 + [2, 2]), np.array([1] * 10), "agrees with the golden output in 80.0%"),
        (np.array([], F), np.array([], F), ""),
    ],
)
def test_golden_outputs_are_held_to_tolerance_and_agreement(found, expected, words):
    reason = differs("y", found, expected, PROBE)
    assert words in reason
    assert bool(words) == bool(reason)


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit status 0"), (-9, "SIGKILL (out of memory?)"), (-6, "SIGABRT"), (-99, "signal 99"), (None, "unknown")],
)
def test_how_a_worker_ended_is_said_in_words(status, words):
    assert words in how_it_ended(status)


# --- the command line -----------------------------------------------------------------------------------


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return action.choices


def test_every_command_has_help_that_teaches():
    assert set(commands()) == {"run", "enroll", "status", "doctor"}
    for command in commands().values():
        assert command.description
        for action in command._actions:
            assert action.help, action.dest


@pytest.mark.parametrize("name", ["enroll", "status", "doctor"])
def test_every_command_that_prints_can_print_json(name):
    assert "--json" in commands()[name].format_help()


def test_errors_are_one_sentence_with_a_documented_code_and_no_traceback(tmp_path, capsys):
    assert main(["status", "--data", str(tmp_path)]) == 66
    printed = capsys.readouterr()
    assert printed.err.startswith("skerry-agent: this device is not enrolled")
    assert "Traceback" not in printed.err
    assert main(["status", "--json", "--data", str(tmp_path)]) == 66
    assert json.loads(capsys.readouterr().out)["code"] == 66
    with pytest.raises(NotFound):
        main(["status", "--debug", "--data", str(tmp_path)])


def test_run_on_a_device_that_is_not_enrolled_ends_with_what_to_do(tmp_path, capsys):
    assert main(["run", "--data", str(tmp_path)]) == 66
    assert "skerry devices invite" in capsys.readouterr().err


def test_enroll_with_a_piece_of_a_token_ends_with_what_to_do(tmp_path, capsys):
    assert main(["enroll", "half", "--data", str(tmp_path / "new")]) == 2
    assert "all of it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND (see: skerry-agent --help)"),
        (["statu"], "invalid choice: 'statu'"),
        (["run", "--x"], "unrecognized arguments: --x"),
        (["enroll"], "TOKEN (see: skerry-agent enroll --help)"),
        (["status", "--data"], "expected one argument (see: skerry-agent status --help)"),
    ],
)
def test_wrong_usage_is_one_sentence(arguments, said, capsys):
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("skerry-agent: ")
    assert said in text
    assert text.count("\n") == 1


def test_help_names_every_exit_code():
    text = parser().format_help()
    codes = text[text.index("exit codes:") :]
    for kind in (SkerryError, *SkerryError.__subclasses__()):
        assert re.search(rf"[ \n]{kind.exit_code} ", codes) or kind is NotReached, kind  # no command here has a target


def test_run_on_an_occupied_port_announces_nothing(tmp_path, capsys):
    files = IdentityFiles(tmp_path / "identity")
    files.folder.mkdir()
    for path in (files.key, files.cert, files.ca, files.root, files.director):
        path.write_text("x")
    files.device.write_bytes(encode_json(Controller("board-1", "https://127.0.0.1:1", "mqtt://127.0.0.1:1")))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        (tmp_path / "agent.yaml").write_text(f"listen: 127.0.0.1:{taken.getsockname()[1]}\n")
        assert main(["run", "--data", str(tmp_path)]) == 69
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("skerry-agent: cannot listen on 127.0.0.1:")


def test_the_supervisor_carries_no_heavy_package():
    """numpy, grpc, tuf and the runtimes belong to children; the rest has no place on a device."""
    code = (
        "import sys, asyncio\n"
        "import edge_agent.__main__, edge_agent.agent, edge_agent.links, edge_agent.status, edge_agent.capabilities\n"
        "import skills.mqtt, skills.desired\n"
        "heavy = {'numpy', 'grpc', 'tuf', 'onnxruntime', 'torch', 'onnx', 'typer', 'rich', 'sqlalchemy', 'pydantic', 'PIL',\n"
        "         'ai_edge_litert', 'yaml', 'httpx', 'google', 'cryptography'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_every_key_of_agent_yaml_stands_in_the_documentation_with_its_default():
    page = (Path(__file__).parents[2] / "docs/agent.md").read_text()
    for field in AgentConfig.__dataclass_fields__.values():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{field.name}` |")]
        default = field.default
        text = (
            f"[{', '.join(default)}]"
            if isinstance(default, tuple)
            else f"{default:g}"
            if isinstance(default, float)
            else str(default)
        )
        assert f"| {text} |" in row.replace("`", ""), row


def test_a_second_ca_behind_the_invited_one_is_not_trusted(tmp_path, monkeypatch):
    foreign = Authority(tmp_path / "foreign", [])
    # Base64 ends in padding for two sizes of three, and only there decoders stop before what comes next.
    candidates = (Authority(tmp_path / str(number), []) for number in itertools.count())
    ours = next(one for one in candidates if len(ssl.PEM_cert_to_DER_cert(one.ca_pem)) % 3)
    monkeypatch.setattr(enroll, "_exchange", lambda *_: (ours.ca_pem + foreign.ca_pem).encode())
    trusted = enroll.fetch_ca("https://controller:1", ours.fingerprint)
    assert len(ssl.create_default_context(cadata=trusted).get_ca_certs()) == 1
    assert enroll.fingerprint(trusted) == ours.fingerprint
