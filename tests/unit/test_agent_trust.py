"""The judgement of python-tuf's client over a fetched metadata set, with the time handed in."""

import dataclasses
import datetime as dt
import json
from importlib import metadata
from pathlib import Path

import pytest

from edge_agent import trust
from edge_agent.trust import Question, TrustProcess, judge, set_reference_time
from skills import signing
from skills.desired import Assignment, ObjectRef, WantedSkill, seal
from skills.errors import FormatError, SkerryError, TrustError, Unreachable
from skills.files import sha256_hex

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


async def test_the_trust_process_judges_a_release_and_opens_an_assignment(publisher):
    publisher.question()
    packed = (publisher.folder / "set").read_bytes()
    for folder in ("identity", "objects"):
        (publisher.folder / folder).mkdir()
    ref = ObjectRef(sha256_hex(packed), len(packed))
    (publisher.folder / "objects" / ref.sha256).write_bytes(packed)
    (publisher.folder / "identity/root.json").write_bytes(publisher.root)
    director = signing.new_key()
    (publisher.folder / "identity/director.pem").write_bytes(signing.public_pem(director))
    process = TrustProcess(publisher.folder)
    wanted = WantedSkill("tiny", "1.0.0", "skills/tiny/1.0.0.json", REF)
    assert (await process.judge(wanted, ref, int(NOW.timestamp()))).reason == ""
    assignment = Assignment("cam-1", 7, 1, ref, (wanted,))
    assert await process.open(seal(assignment, director), "cam-1", None) == assignment
    with pytest.raises(TrustError, match="the counter 6, 7 was already accepted"):
        await process.open(seal(dataclasses.replace(assignment, counter=6), director), "cam-1", assignment)
    with pytest.raises(TrustError, match="not signed"):
        await process.open(seal(assignment, signing.new_key()), "cam-1", None)
    with pytest.raises(FormatError):
        await process.open(b"\xff\x00", "cam-1", None)
    (publisher.folder / "identity/director.pem").unlink()
    with pytest.raises(Unreachable, match="status 1"):
        await process.open(seal(assignment, director), "cam-1", None)


def test_the_trusted_folder_reaches_the_disk(publisher, monkeypatch):
    synced = []
    real = trust.os.fsync
    monkeypatch.setattr(
        trust.os, "fsync", lambda fd: (synced.append(Path(f"/proc/self/fd/{fd}").readlink().name), real(fd))
    )
    judge(publisher.question())
    assert {"timestamp.json", "snapshot.json", "targets.json", "trusted"} <= set(synced)
