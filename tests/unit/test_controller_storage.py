"""The controller's disk: full, damaged, restored, or read by a newer version."""

import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from cryptography import x509
from sqlalchemy import text

from cloud.authority import Authority
from cloud.database import Database, Event, Fact
from cloud.fleet import Fleet
from cloud.journal import Journal, open_journal
from cloud.registry import Registry
from skills import signing
from skills.errors import FormatError, NotFound, StorageError, TrustError
from skills.files import sha256_hex


@pytest.fixture
def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database(f"sqlite:///{tmp_path / 'x.db'}")
    yield opened  # type: ignore[misc]
    opened.close()


@pytest.fixture
def registry(tmp_path: Path, database: Database) -> Registry:
    return Registry(tmp_path, database, open_journal(None), lambda: 1_800_000_000.0)


def full_disk(registry: Registry) -> None:
    raise StorageError("no space left")


async def body(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


def test_a_full_disk_is_one_sentence_and_the_transaction_is_undone(database: Database) -> None:
    with database.begin() as session:
        session.execute(text("PRAGMA max_page_count=1"))  # as small as it is now: the next page is refused
        pages = session.execute(text("PRAGMA page_count")).scalar_one()
        session.execute(text(f"PRAGMA max_page_count={pages}"))
    with pytest.raises(StorageError, match="no space left"), database.begin() as session:
        session.add_all(Event(time=0.0, kind="x" * 60, device=None, data={"n": "y" * 500}) for _ in range(200))
    with database.begin() as session:
        assert session.query(Event).count() == 0


def test_a_database_of_a_newer_version_is_not_touched(tmp_path: Path, database: Database) -> None:
    with database.begin() as session:
        session.merge(Fact(key="schema", value="99"))
    with pytest.raises(StorageError, match="the database has the schema 99"):
        Database(f"sqlite:///{tmp_path / 'x.db'}")


def test_what_is_no_database_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "y.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match="not a database"):
        Database(f"sqlite:///{tmp_path / 'y.db'}")


async def test_an_object_appears_whole_or_not_at_all(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = sha256_hex(b"ab")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="no space left to write"):
            await registry.put(name, body(b"a", b"b"))
    assert registry.size_of(name) is None
    assert list((tmp_path / "objects").glob(".*")) == []
    assert await registry.put(name, body(b"a", b"b")) == 2
    assert registry.size_of(name) == 2


async def test_an_object_with_another_hash_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(TrustError, match="not 000000000000… as its name says"):
        await registry.put("0" * 64, body(b"x"))
    assert list((tmp_path / "objects").glob(".*")) == []


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "x" * 64, "A" * 64, "0" * 63])
def test_only_a_hash_names_an_object(registry: Registry, name: str) -> None:
    with pytest.raises(FormatError):
        registry.path_of(name)


def test_a_piece_of_an_object_that_is_not_there_is_said(registry: Registry) -> None:
    with pytest.raises(NotFound, match="has no object"):
        registry.read_chunk("0" * 64, 0, 10)


def test_online_metadata_never_goes_back_even_after_a_restored_backup(
    tmp_path: Path, registry: Registry, database: Database
) -> None:
    timestamp = tmp_path / "repository" / "timestamp.json"
    backup = timestamp.read_bytes()
    for _ in range(5):
        registry.refresh()
    newest = signing.metadata_version(timestamp.read_bytes())
    timestamp.write_bytes(backup)
    Registry(tmp_path, database, open_journal(None), lambda: 1_800_000_600.0)
    assert signing.metadata_version(timestamp.read_bytes()) > newest


async def test_a_release_lost_by_the_database_is_adopted_from_the_repository_again(
    tmp_path: Path, registry: Registry, small_bundle: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime as dt

    from skills.bundle import BundleFile
    from skills.desired import ObjectRef

    bundle = small_bundle("1.0.0")
    assert isinstance(bundle, BundleFile)
    for sha256, data in {**bundle.objects, bundle.digest: bundle.manifest_bytes}.items():
        await registry.put(sha256, body(data))
    key = signing.load_key(tmp_path / "keys" / "publisher.pem")
    ref = ObjectRef(bundle.digest, len(bundle.manifest_bytes))
    now = dt.datetime.fromtimestamp(1_800_000_000, dt.UTC)
    targets = signing.add_release(registry.role("targets"), "skills/tiny/1.0.0.json", ref, key, now)
    with monkeypatch.context() as patched:
        patched.setattr(Registry, "refresh", full_disk)
        with pytest.raises(StorageError):
            await registry.accept(bundle.digest, targets)
    first = await registry.accept(bundle.digest, targets)
    shown = signing.unpack_metadata(registry.path_of(registry.metadata.sha256).read_bytes())
    assert shown.targets.encode() == targets
    assert (await registry.accept(bundle.digest, targets)).id == first.id  # a lost answer is asked for again
    other = Database(f"sqlite:///{tmp_path / 'fresh.db'}")
    again = Registry(tmp_path, other, open_journal(None), lambda: 1_800_000_000.0)
    assert [row.version for row in again.releases()] == ["1.0.0"]
    other.close()


def test_an_invitation_works_once_but_a_lost_answer_may_be_asked_for_again(
    tmp_path: Path, database: Database, csr: Callable[[], str]
) -> None:
    now = [1000.0]
    fleet = Fleet(database, Authority(tmp_path / "ca", []), open_journal(None), lambda: now[0])
    token = fleet.invite("https://x", {"site": "a"}, 60).token()
    request = csr()
    assert fleet.enroll(token, request, None).device == fleet.enroll(token, request, None).device
    with pytest.raises(TrustError, match="used already"):
        fleet.enroll(token, csr(), None)
    with pytest.raises(TrustError, match="used already"):
        fleet.enroll(token, csr(), "other")
    second = fleet.invite("https://x", {}, 60).token()
    now[0] += 61
    with pytest.raises(TrustError, match="unknown or has expired"):
        fleet.enroll(second, csr(), None)
    assert len(fleet.devices()) == 1


def test_a_removed_device_keeps_no_certificate_that_was_not_revoked(
    tmp_path: Path, database: Database, csr: Callable[[], str]
) -> None:
    authority = Authority(tmp_path / "ca", [])
    fleet = Fleet(database, authority, open_journal(None), lambda: 1000.0)
    token, request = fleet.invite("https://x", {}, 60).token(), csr()
    issued = [fleet.enroll(token, request, None) for _ in range(2)]
    fleet.remove(issued[0].device)
    revoked = {entry.serial_number for entry in x509.load_pem_x509_crl(authority.crl_file.read_bytes())}
    assert revoked == {x509.load_pem_x509_certificate(one.cert_pem.encode()).serial_number for one in issued}


def test_a_log_line_is_one_line_whatever_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "c.log"
    journal: Journal = open_journal(path)
    journal.info("device.said", device="cam-1", text='a "b"\nforged line', empty="", none=None)
    journal.close()
    lines = path.read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(r'INFO device.said device=cam-1 text="a \"b\"\nforged line" empty=""')
