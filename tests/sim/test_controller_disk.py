"""A disk that is full at the n-th durable write, for every n: one clear error, and the next try finds everything whole."""

import asyncio
import datetime as dt
import errno
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cloud.authority import Authority
from cloud.broker import choose_broker
from cloud.config import Settings, choose_ports, keep_ports
from cloud.database import Database
from cloud.journal import open_journal
from cloud.registry import Registry
from skills import signing
from skills.bundle import BundleFile
from skills.desired import ObjectRef
from skills.errors import StorageError

NOW = 1_800_000_000.0


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def live(data: Path, bundle: BundleFile) -> list[str]:
    """Start on a data directory, take in a release, and return what is released."""
    keep_ports(data, choose_ports(Settings(data=data, api_port=0, mqtt_port=0, tail_port=0)))
    authority = Authority(data / "ca", ())
    choose_broker(None, "127.0.0.1", 1, authority, data / "broker", embedded=True)
    database = Database(f"sqlite:///{data / 'skerry.db'}")
    try:
        registry = Registry(data, database, open_journal(None), lambda: NOW)
        for sha256, content in {**bundle.objects, bundle.digest: bundle.manifest_bytes}.items():
            await registry.put(sha256, once(content))
        current = registry.role("targets")
        target = "skills/tiny/1.0.0.json"
        if target not in signing.list_releases(current):
            key = signing.load_key(data / "keys" / "publisher.pem")
            ref = ObjectRef(bundle.digest, len(bundle.manifest_bytes))
            current = signing.add_release(current, target, ref, key, dt.datetime.fromtimestamp(NOW, dt.UTC))
        await registry.accept(bundle.digest, current)
        packed = registry.path_of(registry.metadata.sha256).read_bytes()
        assert target in signing.unpack_metadata(packed).targets
        return [row.version for row in registry.releases()]
    finally:
        database.close()


class FullDisk:
    """Lets `good` durable writes pass, then refuses one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, good: int) -> None:
        self.left, self.refused = good, False
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, descriptor: int) -> None:
        if self.left == 0 and not self.refused:
            self.refused = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        self._fsync(descriptor)


def test_whichever_write_the_disk_refuses_the_next_start_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_bundle: Callable[..., BundleFile]
) -> None:
    bundle = small_bundle("1.0.0", model_bytes=2000)
    good = 0
    while True:
        data = tmp_path / f"data-{good}"
        data.mkdir()
        with monkeypatch.context() as patched:
            disk = FullDisk(patched, good)
            try:
                assert asyncio.run(live(data, bundle)) == ["1.0.0"]
            except StorageError as error:
                assert "no space left to write" in str(error)
        if not disk.refused:
            break
        assert asyncio.run(live(data, bundle)) == ["1.0.0"], f"after the write number {good} was refused"
        assert not list(data.rglob(".*.tmp"))
        good += 1
    assert good > 30
