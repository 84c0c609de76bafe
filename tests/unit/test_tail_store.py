"""The plans on a tail's disk: laid out whole or not at all, and what failed to load leaves nothing behind."""

import asyncio
import concurrent.futures
import datetime as dt
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cloud import registry as registry_module
from cloud.database import Database
from cloud.journal import open_journal
from cloud.registry import Registry
from cloud.tail.layout import lay_out
from cloud.tail.pace import Pace
from cloud.tail.store import Loaded, Loading, Store, install
from skills import signing
from skills.bundle import BundleFile
from skills.desired import ObjectRef
from skills.errors import NotFound, StorageError, TrustError
from skills.ort import Chain
from skills.split_plan import Plan, load_plan, plan_hash

Build = Callable[[str], BundleFile]
NOW = 1_800_000_000.0


@pytest.fixture
def folder(split_bundle: Build, tmp_path: Path) -> Path:
    split_bundle("1.0.0")
    return tmp_path / "halves-1.0.0" / "split"


def plan_of(folder: Path) -> tuple[Plan, str]:
    text = (folder / "split.yaml").read_text()
    return load_plan(text), text


def test_an_installed_plan_lies_under_its_hash_with_its_segments(folder: Path, tmp_path: Path) -> None:
    tails = tmp_path / "tails"
    name = install(folder, tails)
    assert name == plan_hash(plan_of(folder)[0]) == install(folder, tails)
    assert Store(tails).names() == (name,)
    assert {path.name for path in (tails / name).iterdir()} == {"split.yaml", "0.onnx", "1.onnx"}


def test_a_layout_that_was_interrupted_is_served_to_nobody_and_made_anew(folder: Path, tmp_path: Path) -> None:
    plan, text = plan_of(folder)
    tails = tmp_path / "tails"

    def breaks(file: str) -> bytes:
        if file == "1.onnx":
            raise StorageError("no space left")
        return (folder / file).read_bytes()

    with pytest.raises(StorageError):
        lay_out(plan, text, breaks, tails)
    assert Store(tails).names() == ()
    assert lay_out(plan, text, lambda file: (folder / file).read_bytes(), tails)
    assert not lay_out(plan, text, breaks, tails)  # it lies there: nothing is read
    assert [path.name for path in tails.iterdir()] == [plan_hash(plan)]


def test_a_plan_that_fails_to_load_is_looked_at_again_and_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    tails = tmp_path / "tails"
    name = install(folder, tails)
    store = Store(tails)
    (tails / name / "1.onnx").write_bytes(b"other")
    with pytest.raises(TrustError, match="is not the one that was planned"):
        store.get(name)
    (tails / name / "1.onnx").unlink()
    with pytest.raises(NotFound, match=r"names 1\.onnx, which is not there"):
        store.get(name)
    assert not store._loading


async def test_the_loop_goes_on_while_a_release_is_unpacked_and_written(
    tmp_path: Path, split_bundle: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, database = split_bundle("1.0.0"), Database(f"sqlite:///{tmp_path / 'x.db'}")
    registry = Registry(tmp_path / "data", database, open_journal(None), lambda: NOW)

    async def once(data: bytes) -> AsyncIterator[bytes]:
        yield data

    for sha256, data in {**bundle.objects, bundle.digest: bundle.manifest_bytes}.items():
        await registry.put(sha256, once(data))
    key = signing.load_key(tmp_path / "data" / "keys" / "publisher.pem")
    ref = ObjectRef(bundle.digest, len(bundle.manifest_bytes))
    targets = signing.add_release(
        registry.role("targets"), "skills/halves/1.0.0.json", ref, key, dt.datetime.fromtimestamp(NOW, dt.UTC)
    )
    loop, began, went_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    def slow(plan: Plan, text: str, read: Callable[[str], bytes], tails: Path) -> bool:
        loop.call_soon_threadsafe(began.set)
        assert went_on.wait(10), "the loop stood still"
        return lay_out(plan, text, read, tails)

    monkeypatch.setattr(registry_module, "lay_out", slow)
    accepting = asyncio.create_task(registry.accept(bundle.digest, targets))
    async with asyncio.timeout(10):
        await began.wait()
        assert registry.releases() == []
        went_on.set()
        assert (await accepting).version == "1.0.0"
    (plan,) = Store(tmp_path / "data" / "tails").names()
    assert (tmp_path / "data" / "tails" / plan / "1.onnx").read_bytes() == b"segment 1 of 1.0.0"
    database.close()


class SlowStore(Store):
    """Loads a plan when the test says so."""

    def __init__(self, tails: Path) -> None:
        super().__init__(tails)
        self.begun, self.go_on, self.loads = threading.Event(), threading.Event(), 0

    def _load(self, name: str) -> Loaded:
        self.loads += 1
        self.begun.set()
        assert self.go_on.wait(20)
        if self.loads == 1 and name == "0" * 16:
            raise TrustError("damaged")
        return Loaded(name, load_plan((self._folder / name / "split.yaml").read_text()), Chain((), ()), Pace(2))


def test_while_one_thread_loads_a_plan_the_others_are_sent_away_and_it_is_loaded_once(
    folder: Path, tmp_path: Path
) -> None:
    name = install(folder, tmp_path / "tails")
    store = SlowStore(tmp_path / "tails")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(store.get, name)
        assert store.begun.wait(10)
        for _ in range(3):
            with pytest.raises(Loading, match="is being loaded: ask again"):
                store.get(name, 0)
        waiting = [pool.submit(store.get, name, 20) for _ in range(3)]
        store.go_on.set()
        assert {id(one.result(10)) for one in (first, *waiting)} == {id(store.get(name))}
    assert store.loads == 1
    assert not store._loading


def test_who_waits_for_a_plan_that_does_not_load_is_told_why_and_the_next_one_looks_again(
    folder: Path, tmp_path: Path
) -> None:
    tails, name = tmp_path / "tails", "0" * 16
    (tails / install(folder, tails)).rename(tails / name)
    store = SlowStore(tails)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(store.get, name)
        assert store.begun.wait(10)
        second = pool.submit(store.get, name, 20)
        store.go_on.set()
        for one in (first, second):
            error = one.exception(10)
            assert error is None or isinstance(error, TrustError)
        assert isinstance(first.exception(), TrustError)
    assert store.get(name).name == name
