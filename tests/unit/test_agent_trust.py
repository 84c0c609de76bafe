"""The judgement of python-tuf's client over a fetched metadata set, with the time handed in."""

import datetime as dt
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from edge_agent import trust
from edge_agent.trust import Question, judge, set_reference_time
from skills import signing
from skills.desired import ObjectRef
from skills.errors import SkerryError
from skills.wire import encode_json

NOW = dt.datetime(2026, 11, 21, tzinfo=dt.UTC)
REF = ObjectRef("a" * 64, 1234)


class Publisher:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root_key, self.key, self.online = (signing.new_key() for _ in range(3))
        self.root = signing.new_root(self.root_key, self.key, self.online, NOW)
        self.targets = signing.new_targets(self.key, NOW)
        (folder / "root.json").write_bytes(self.root)

    def question(self, version: int = 1, now: dt.datetime = NOW, ref: ObjectRef = REF) -> Question:
        snapshot, timestamp = signing.sign_online(self.targets, version, self.online, now)
        packed = signing.pack_metadata({1: self.root}, timestamp, snapshot, self.targets)
        (self.folder / "set").write_bytes(packed)
        return Question(
            str(self.folder / "set"), str(self.folder / "trusted"), str(self.folder / "root.json"),
            "skills/tiny/1.0.0.json", ref.sha256, ref.size, int(NOW.timestamp()),
        )  # fmt: skip


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path)
    made.targets = signing.add_release(made.targets, "skills/tiny/1.0.0.json", REF, made.key, NOW)
    return made


def test_a_listed_release_with_the_right_content_is_trusted(publisher):
    assert judge(publisher.question()).reason == ""


def test_a_listed_release_with_other_content_is_not(publisher):
    assert "another content" in judge(publisher.question(ref=ObjectRef("b" * 64, 1234))).reason
    assert "another content" in judge(publisher.question(2, ref=ObjectRef("a" * 64, 1235))).reason


def test_older_metadata_than_the_device_has_seen_is_refused(publisher):
    assert judge(publisher.question(7)).reason == ""
    assert "not trusted" in judge(publisher.question(3)).reason
    assert judge(publisher.question(8)).reason == ""


def test_a_change_anywhere_in_the_metadata_is_refused(publisher):
    question = publisher.question()
    packed = json.loads((publisher.folder / "set").read_bytes())
    for role in ("timestamp", "snapshot", "targets"):
        file = json.loads(packed[role])
        file["signed"]["version"] += 1
        changed = {**packed, role: json.dumps(file)}
        (publisher.folder / "set").write_text(json.dumps(changed))
        assert "not trusted" in judge(question).reason, role


@pytest.mark.parametrize("text", [b"", b"{}", b"\xff", b'{"root":{"1":"x"},"timestamp":"","snapshot":"","targets":""}'])
def test_any_bytes_as_metadata_are_a_reason_and_no_traceback(publisher, text):
    question = publisher.question()
    (publisher.folder / "set").write_bytes(text)
    assert judge(question).reason


def test_the_time_is_the_one_handed_in(publisher):
    question = publisher.question(now=NOW - dt.timedelta(days=30))
    assert "expired" in judge(question).reason


def test_the_private_attribute_through_which_time_is_handed_in_has_not_moved(publisher, tmp_path):
    from tuf.ngclient.updater import Updater

    (tmp_path / "t").mkdir()
    updater = Updater(str(tmp_path / "t"), "x://y", fetcher=object(), bootstrap=publisher.root)
    set_reference_time(updater, 1_000_000_000)
    assert updater._trusted_set.reference_time == dt.datetime.fromtimestamp(1_000_000_000, dt.UTC)


def test_a_python_tuf_that_keeps_its_time_elsewhere_stops_installs():
    with pytest.raises(SkerryError, match="pinned version"):
        set_reference_time(object(), 0)


def test_tuf_is_pinned_exactly():
    pins = [r for r in metadata.requires("skerry") or [] if r.startswith("tuf")]
    assert pins
    assert all("==" in pin for pin in pins)


def test_the_trust_process_answers_one_question_and_ends(publisher):
    command = [sys.executable, "-m", "edge_agent.trust"]
    good = subprocess.run(
        command, input=encode_json(publisher.question()), capture_output=True, timeout=60, check=False
    )
    assert (good.returncode, json.loads(good.stdout)) == (0, {"reason": ""})
    bad = subprocess.run(command, input=b"what?", capture_output=True, timeout=60, check=False)
    assert bad.returncode == 1
    assert b"Traceback" not in bad.stderr


def test_the_trusted_folder_reaches_the_disk(publisher, monkeypatch):
    synced = []
    real = trust.os.fsync
    monkeypatch.setattr(
        trust.os, "fsync", lambda fd: (synced.append(Path(f"/proc/self/fd/{fd}").readlink().name), real(fd))
    )
    judge(publisher.question())
    assert {"timestamp.json", "snapshot.json", "targets.json", "trusted"} <= set(synced)
