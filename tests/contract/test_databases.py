"""The same life of a fleet on SQLite and, where SKERRY_POSTGRES names an empty database (an SQLAlchemy URL), on PostgreSQL."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cloud.authority import Authority
from cloud.database import Base, Database, Release
from cloud.device_fake import ANY_PC
from cloud.fleet import Fleet
from cloud.journal import open_journal
from cloud.orders import Orders
from cloud.registry import Registry
from skills.errors import NotFound
from skills.report import DeviceState, Hello, SkillState
from skills.wire import encode_json

NOW = 1_900_000_000.0


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'x.db'}"
    if request.param == "postgresql":
        url = os.environ.get("SKERRY_POSTGRES", "")
        if not url:
            pytest.skip("SKERRY_POSTGRES is not set")
    opened = Database(url)
    yield opened
    Base.metadata.drop_all(opened._engine)
    opened.close()


def test_a_fleet_joins_takes_two_releases_goes_back_and_leaves(
    database: Database, tmp_path: Path, csr: Callable[[], str], small_bundle: Callable[..., object]
) -> None:
    journal = open_journal(None)
    fleet = Fleet(database, Authority(tmp_path / "ca", []), journal, lambda: NOW)
    registry = Registry(tmp_path / "data", database, journal, lambda: NOW)
    orders = Orders(database, fleet, registry, lambda: NOW)
    for name in ("a", "b"):
        fleet.enroll(fleet.invite("https://x", {"site": "north"}, 60).token(), csr(), name)
        fleet.heard_hello(name, encode_json(Hello(name, "0" * 32, "boot", ANY_PC)))
    digests = {
        version: add_release(database, registry, small_bundle(version), version) for version in ("1.0.0", "2.0.0")
    }

    def serve(name: str, version: str, seq: int) -> None:
        counter = fleet.device(name).counter
        entry = SkillState("tiny", version, digests[version], "serving")
        fleet.heard_state(name, encode_json(DeviceState(name, seq, counter, (entry,))))

    for seq, version in enumerate(("1.0.0", "2.0.0")):
        number, changed = orders.push("tiny", version, "site=north", "1")
        assert changed == {"a"}
        serve("a", version, seq)
        assert orders.step({"a"}) == {"b"}
        serve("b", version, seq)
        assert orders.step({"b"}) == set()
        assert orders.rollout(number)["state"] == "done"
    assert orders.rollback("tiny", "all")[1] == {"a", "b"}
    assert fleet.wanted("a") == {"tiny": "1.0.0"}
    assert len(orders.assignment("a")) < 2000
    fleet.remove("a")
    with pytest.raises(NotFound):
        fleet.device("a")
    assert [event.kind for event in fleet.events(2)] == ["device.removed", "rollback.started"]


def add_release(database: Database, registry: Registry, bundle: object, version: str) -> str:
    from skills.bundle import BundleFile

    assert isinstance(bundle, BundleFile)
    registry.path_of(bundle.digest).write_bytes(bundle.manifest_bytes)
    with database.begin() as session:
        row = Release(
            skill="tiny", version=version, manifest_sha256=bundle.digest, manifest_size=len(bundle.manifest_bytes)
        )
        row.target, row.time = f"skills/tiny/{version}.json", NOW
        session.add(row)
    return bundle.digest
