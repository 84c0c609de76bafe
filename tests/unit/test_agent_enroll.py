"""Enrolment on a disk that is full: nothing is lost but time, the same line works again."""

import errno
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from cloud.authority import Authority
from cloud.database import Database
from cloud.fleet import Fleet
from cloud.journal import open_journal
from edge_agent import enroll
from edge_agent.identity import IdentityFiles, load_identity
from skills.errors import FormatError, StorageError


class Desk:
    """A controller's enrolment without the network in between."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "ca", [])
        self.database = Database(f"sqlite:///{folder / 'x.db'}")
        self.fleet = Fleet(self.database, self.authority, open_journal(None), lambda: 1_800_000_000.0)
        self.token = self.fleet.invite("https://controller:1", {}, 600).token()
        self.posts = 0

    def exchange(self, _url: str, _method: str, path: str, body: bytes | None, _context: Any) -> bytes:
        if path == "/v1/ca":
            return self.authority.ca_pem.encode()
        self.posts += 1
        asked = json.loads(body or b"")
        joined = self.fleet.enroll(asked["token"], asked["csr_pem"], asked.get("name"))
        welcome = {"device": joined.device, "cert_pem": joined.cert_pem, "ca_pem": self.authority.ca_pem}
        more = {"mqtt_url": "mqtts://controller:2", "tail_url": "", "root_json": "{}", "director_pem": "pem"}
        return json.dumps(welcome | more).encode()


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "controller"
    folder.mkdir()
    made = Desk(folder)
    monkeypatch.setattr(enroll, "_exchange", made.exchange)
    yield made
    made.database.close()


class FullDisk:
    """The n-th durable write of the device finds no space: at the fsync of a file, at its new name, or at the folder's fsync."""

    def __init__(self, folder: Path, number: int, patch: pytest.MonkeyPatch) -> None:
        self.count, self.number = 0, number
        real_fsync, real_replace = os.fsync, os.replace

        def fsync(descriptor: int) -> None:
            self.tick(str(Path(f"/proc/self/fd/{descriptor}").readlink()), folder)
            real_fsync(descriptor)

        def replace(source: Any, target: Any) -> None:
            self.tick(str(source), folder)
            real_replace(source, target)

        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "replace", replace)

    def tick(self, path: str, folder: Path) -> None:
        if path.startswith(str(folder)):
            self.count += 1
            if self.count == self.number:
                raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_is_full_at_any_write_leaves_a_device_that_the_same_line_enrols(desk: Desk, tmp_path: Path) -> None:
    for number in itertools.count(1):
        data = tmp_path / f"device{number}"
        name, token = f"board-{number}", desk.fleet.invite("https://controller:1", {}, 600).token()
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(data, number, patch)
            try:
                enroll.enroll(data, token, name=name)
            except StorageError as error:
                assert "no space left" in str(error)
                left = sorted(path.name for path in (data / "identity").iterdir())
                assert left in ([], ["key.pem"])
            else:
                break
        assert disk.count >= number
        assert enroll.enroll(data, token, name=name).device == name
        assert load_identity(data).device == name
    assert number > 15
    assert not (tmp_path / f"device{number}" / "identity" / "reserve").exists()


def test_a_disk_without_room_for_the_identity_uses_no_invitation(desk: Desk, tmp_path: Path) -> None:
    data = tmp_path / "device"
    with pytest.MonkeyPatch.context() as patch:
        FullDisk(data, 4, patch)  # the key is written, the reserve is not
        with pytest.raises(StorageError):
            enroll.enroll(data, desk.token)
    assert desk.posts == 0
    assert sorted(path.name for path in (data / "identity").iterdir()) == ["key.pem"]


def test_a_damaged_key_is_one_sentence_that_says_what_to_do(desk: Desk, tmp_path: Path) -> None:
    files = IdentityFiles(tmp_path / "device" / "identity")
    files.folder.mkdir(parents=True)
    files.key.write_bytes(b"torn")
    with pytest.raises(FormatError, match=r"remove key\.pem"):
        enroll.enroll(tmp_path / "device", desk.token)
